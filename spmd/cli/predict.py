"""run.py predict --experiment NAME --out FILE: the outputs of a run's model for each example of its data."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.experiment import registry

FORMATS = (".parquet", ".jsonl")
NUMBER = "example"  # the column of the numbers of the examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `run.py predict`."""

    out: str = ""
    """New file, .parquet or .jsonl: a row for each example."""
    split: Literal["eval", "train"] = "eval"
    """Split of the data to predict; --data.* may name other data than the run's."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Write `example`, the number of the example, and `output`, or a column for each output of the model."""
    exp, options = registry.load(name, words, PredictOptions)
    check(
        bool(options.out), "give the new file: run.py predict --experiment NAME --out FILE.parquet"
    )
    path = Path(options.out)
    check(
        path.suffix in FORMATS,
        f"--out {options.out} is neither {' nor '.join(FORMATS)}",
    )
    check(not path.exists(), f"--out {options.out} exists; name a new file, or move it away")
    check(path.parent.is_dir(), f"--out {options.out}: there is no directory {path.parent}")
    from spmd.runtime import agree

    step = None if options.step < 0 else options.step
    snapshot = exp.restore(step, same=("tokenizer",), other_data=True)
    source = exp.data.open_checked(options.split)
    is_writer = not agree.has_peers() or agree.is_first()
    with _writer(path) if is_writer else contextlib.nullcontext(lambda rows: None) as write:
        start = 0
        for outputs in snapshot.predictions(source):
            columns = columns_of(outputs, start)
            write(columns)
            start += len(columns[NUMBER])
    agree.say(f"{options.out}: {start} rows, step {snapshot.step}")
    return 0


def columns_of(outputs: Any, start: int) -> dict[str, Any]:
    """The columns of a batch.

    Args:
        outputs: of the model, an array [N, ...] or a dict of them.
        start: number of the first example.

    Returns:
        {name: array [N, ...]}, the numbers of the examples first.

    Raises:
        ValueError: an output has the name of that column.
    """
    columns = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    check(
        NUMBER not in columns,
        f"the model has an output named {NUMBER!r}, as is the column of the examples' numbers: rename it"
        f" (its outputs: {', '.join(columns)})",
    )
    num = len(next(iter(columns.values())))
    return {NUMBER: np.arange(start, start + num, dtype=np.int64), **columns}


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends columns; the file appears under its name once it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _parquet(partial) if path.suffix == ".parquet" else _json_lines(partial) as write:
            yield write
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    with path.open("w", encoding="utf-8") as file:

        def write(columns: Mapping[str, Any]) -> None:
            for row in zip(*(x.tolist() for x in columns.values()), strict=True):
                file.write(json_text(dict(zip(columns, row, strict=True))) + "\n")

        yield write


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            "writing Parquet needs pyarrow: pip install pyarrow, or name a .jsonl file"
        ) from None
    with contextlib.ExitStack() as closing:
        writers: list[Any] = []

        def write(columns: Mapping[str, Any]) -> None:
            arrays = {n: pa.array(x.tolist(), _arrow_type(pa, x)) for n, x in columns.items()}
            table = pa.table(arrays)
            if not writers:
                writers.append(closing.enter_context(pq.ParquetWriter(path, table.schema)))
            writers[0].write_table(table)

        yield write


def _arrow_type(pa: Any, column: Any) -> Any:
    """Lists as deep as an array's rows, of its type; narrow floats as float32."""
    kind = pa.float32() if column.dtype.itemsize < 4 and column.dtype.kind not in "iub" else None
    kind = kind or pa.from_numpy_dtype(column.dtype)
    for _ in column.shape[1:]:
        kind = pa.list_(kind)
    return kind
