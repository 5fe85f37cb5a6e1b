"""TFDS builders over embedded data: prepared without TensorFlow and without network."""

from __future__ import annotations

import platform
import re
from typing import Any

EMBEDDED = {
    "digits": ("spmd.data.builders.digits", "Digits"),
    "stdlib_source": ("spmd.data.builders.stdlib_source", "StdlibSource"),
}
# Sets whose version is the interpreter's: another Python prepares its own beside.
RUNNING = {"stdlib_source": re.match(r"\d+\.\d+\.\d+", platform.python_version())[0]}  # type: ignore[index]


def make_builder(name: str, data_dir: str) -> Any:
    """The TFDS builder of an embedded set."""
    import importlib

    module, cls = EMBEDDED[name]
    return getattr(importlib.import_module(module), cls)(
        data_dir=data_dir, file_format="array_record"
    )
