"""The source of Python's own standard library: the top-level modules, a file is a document.

Read from the interpreter that runs, whose version is the version of the set: the text differs a little from
one Python to the next. Licence: PSF-2.0. By a hash of its name about every tenth file is in the test split.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from spmd.data.builders import RUNNING


class StdlibSource(tfds.core.GeneratorBasedBuilder):
    """Text and file name of each module that is a single file."""

    name = "stdlib_source"
    VERSION = tfds.core.Version(RUNNING["stdlib_source"])

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "file": tfds.features.Text()}
            ),
            description="The source of Python's standard library, of the interpreter that ran.",
            homepage="https://docs.python.org/3/library/",
            license="PSF-2.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        # The module names are fixed for a version; the generated _sysconfigdata differs by machine.
        library = Path(sysconfig.get_path("stdlib"))
        files = [library / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
        files = [f for f in files if f.is_file() and not f.name.startswith("_sysconfigdata")]
        test = [hashlib.sha256(f.name.encode()).digest()[0] < 26 for f in files]
        pick = lambda in_test: [f for f, t in zip(files, test, strict=True) if t is in_test]
        return {
            "train": self._generate_examples(pick(False)),
            "test": self._generate_examples(pick(True)),
        }

    def _generate_examples(self, files: list[Path]) -> Iterator[Any]:
        for file in files:
            yield file.name, {"text": file.read_text("utf-8"), "file": file.name}
