"""run.py predict --experiment NAME --out FILE: the outputs of a run's model for each example of its data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
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
    """New file, .parquet or .jsonl: a row for each example; or a new folder, for masks as PNG."""
    split: Literal["auto", "eval", "train", "all"] = "auto"
    """Split to predict; auto: eval, or all examples where --data.path is another than the run's."""
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
        path.suffix in (*FORMATS, ""),
        f"--out {options.out} is neither {' nor '.join(FORMATS)}, nor a folder for masks",
    )
    check(not path.exists(), f"--out {options.out} exists; name a new file, or move it away")
    check(path.parent.is_dir(), f"--out {options.out}: there is no directory {path.parent}")
    from spmd.runtime import agree

    step = None if options.step < 0 else options.step
    snapshot = exp.restore(step, same=("tokenizer",), other_data=True)
    data = snapshot.program.data
    split = _split(exp, data, options.split)
    source = data.open_all() if split == "all" else data.open_checked(split)
    restored = _undo(data, source, split) if not path.suffix else None
    is_writer = not agree.has_peers() or agree.is_first()
    with (
        _writer(path, restored) if is_writer else contextlib.nullcontext(lambda rows: None) as write
    ):
        start = 0
        for outputs in snapshot.predictions(source):
            columns = columns_of(outputs, start, source)
            write(_classified(data, columns))
            start += len(columns[NUMBER])
    agree.say(f"{options.out}: {start} rows, step {snapshot.step}")
    return 0


def columns_of(outputs: Any, start: int, source: Any = None) -> dict[str, Any]:
    """The columns of a batch.

    Args:
        outputs: of the model, an array [N, ...] or a dict of them.
        start: number of the first example.
        source: the examples.

    Returns:
        {name: array [N, ...]}: the numbers of the examples, their files where they are files, the outputs.

    Raises:
        ValueError: an output has the name of another column.
    """
    columns = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    rows = np.arange(start, start + len(next(iter(columns.values()))), dtype=np.int64)
    own = {NUMBER: rows, **_named(source, rows)}
    for name in columns:
        check(
            name not in own,
            f"the model has an output named {name!r}, as a column of predict ({', '.join(own)}): rename"
            f" it (its outputs: {', '.join(columns)})",
        )
    return own | {**columns}


def _split(exp: Any, data: Any, split: str) -> Any:
    """The split to predict; data: as the run has it, with the names of the classes."""
    from spmd.train import rundir

    if split != "auto":
        return split
    trained_on = rundir.read_identity(rundir.locate(exp.run.dir, exp.name)).get("data.path")
    return "eval" if getattr(data, "path", None) == trained_on else "all"


def _undo(data: Any, source: Any, split: Any) -> Callable[[int, np.ndarray], np.ndarray]:
    """A function that brings the mask of an example to the size of its image's file."""
    from spmd.data import undo

    transforms = data.transforms_of("train" if split == "train" else "eval")
    undo.check_undoable(transforms)
    feature = undo.encoded_image(transforms, data.features)
    if not feature:
        return lambda number, mask: mask
    image = lambda number: source.take(np.array([number]))[feature][0]
    return lambda number, mask: undo.undo(mask, image(number), transforms)


def _named(source: Any, rows: np.ndarray) -> dict[str, Any]:
    """The file of each example, where examples are files."""
    name_of = getattr(source, "name_of", None)
    return {"file": np.array([name_of(int(i)) for i in rows])} if name_of else {}


def _classified(data: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns; logits of named classes as the class, its probability and those of all."""
    output = columns.get("output")
    classes = getattr(data, "classes", ())
    if output is None or not classes or output.shape[1:] != (len(classes),):
        return dict(columns)
    logits = np.asarray(output, np.float64)
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    share = (scaled / scaled.sum(1, keepdims=True)).astype(np.float32)
    best = share.argmax(1)
    others = {name: x for name, x in columns.items() if name != "output"}
    classified = {
        "class": np.array(classes)[best],
        "probability": share[np.arange(len(best)), best],
        "probabilities": share,
    }
    for name in others:
        check(
            name not in classified,
            f"the model has an output named {name!r}, as a column of predict ({', '.join(classified)}):"
            " rename it",
        )
    return others | classified


@contextlib.contextmanager
def _writer(path: Path, restored: Any) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends columns; the file appears under its name once it is complete.

    restored: of a folder of masks, as _undo returns it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        masks = functools.partial(_masks, restored=restored)
        forms = {".parquet": _parquet, ".jsonl": _json_lines, "": masks}
        with forms[path.suffix](partial) as write:
            yield write
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _masks(folder: Path, restored: Any) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """PNG files of the likeliest class of each pixel, by the names of the images and at their size."""
    from PIL import Image

    folder.mkdir()

    def write(columns: Mapping[str, Any]) -> None:
        output = columns.get("output", np.zeros(0))
        check(
            output.ndim == 4 and output.shape[3] <= 256,
            f"--out is a folder for masks, and the model's output is {output.dtype}{list(output.shape)}: it"
            f" takes logits [N, H, W, classes]; name a {' or '.join(FORMATS)} file",
        )
        numbers = columns[NUMBER].tolist()
        names = columns.get("file", columns[NUMBER]).tolist()
        masks = output.argmax(-1).astype(np.uint8)
        for number, name, mask in zip(numbers, names, masks, strict=True):
            file = (folder / str(name)).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(restored(number, mask)).save(file)

    yield write


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
