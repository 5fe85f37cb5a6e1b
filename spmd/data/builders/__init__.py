"""TFDS builders over embedded data: prepared without TensorFlow and without network."""

from __future__ import annotations

from typing import Any

EMBEDDED = {"digits": "spmd.data.builders.digits"}


def builder(name: str, data_dir: str) -> Any:
    """The TFDS builder of an embedded set."""
    import importlib

    return importlib.import_module(EMBEDDED[name]).Digits(
        data_dir=data_dir, file_format="array_record"
    )
