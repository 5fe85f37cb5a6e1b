"""run.py data prepare | show | check | tokenizer: the input data of an experiment."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spmd.core.fields import check, closest
from spmd.data import TFDS, data_root
from spmd.data.text import Sequences, Text
from spmd.data.text.tokenized import TokenizedRecords
from spmd.experiment import registry

ACTIONS = ("prepare", "show", "check", "tokenizer")
SUFFIX = {"show": ".png", "tokenizer": ".json"}  # of --out
GRID = 32  # examples of the picture
COUNTED = 10_000  # labels counted where records must be read for them
SHOWN = 5  # lines of each kind of finding


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of `run.py data`."""

    out: str = ""
    """With show, a new .png: training examples after their transforms, masks laid over them. With
    tokenizer, a new .json."""
    vocab: int = 8000
    """With tokenizer, the number of its tokens."""


def run(name: str, words: Sequence[str]) -> int:
    """Prepare, show or check the data of an experiment.

    `prepare` runs the TFDS builder and tokenizes text. `show` prints splits, features and class counts, and
    draws examples. `check` reads every record once; it returns 1 where some are bad, or in both splits.
    `tokenizer` trains a byte-level BPE on the training text.
    """
    words = list(words)
    action = words.pop(0) if words and not words[0].startswith("-") else ""
    check(
        action in ACTIONS,
        f"run.py data {action or '(nothing)'}: unknown action."
        f"{closest(action, ACTIONS)} Type: run.py data prepare|show|check|tokenizer --experiment NAME",
    )
    exp, options = registry.load(name, words, DataOptions)
    out = Path(options.out) if options.out else None
    check(
        out is None or action in SUFFIX,
        "--out FILE.png is an option of run.py data show, --out FILE.json of run.py data tokenizer",
    )
    if out is not None:
        check(out.suffix == SUFFIX[action], f"--out {out} is no {SUFFIX[action]} file")
        check(not out.exists(), f"--out {out} exists; name a new file, or move it away")
        check(out.parent.is_dir(), f"--out {out}: there is no directory {out.parent}")
    if action == "prepare":
        _prepare(exp.data)
        return 0
    if action == "tokenizer":
        _train_tokenizer(exp.data, options.vocab, out)
        return 0
    data = exp.data.found()
    if action == "check":
        return _check(data, getattr(exp.model, "classes", 0))
    _show(data)
    if out is not None:
        _draw_grid(data, exp.seed, out)
    return 0


def _train_tokenizer(data: Any, vocab: int, out: Path | None) -> None:
    """Train a byte-level BPE on the texts of the training split, and write it."""
    from spmd.data.text import bpe

    check(out is not None, "run.py data tokenizer writes a file: give --out FILE.json")
    assert out is not None
    check(
        isinstance(data, TokenizedRecords | Text),
        f"{type(data).__name__} data is no text on which a tokenizer could be trained",
    )
    size = bpe.vocab_of(f"{bpe.PREFIX}{vocab}")
    out.write_text(bpe.train(data.texts_of("train"), size), encoding="utf-8")
    print(f"{out}: take it with --data.tokenizer {out}")


def _prepare(data: Any) -> None:
    if isinstance(data, Sequences):
        _prepare_sets(data)
        for split in ("train", "eval"):
            print(
                f"{split}: {len(data.open_checked(split))} windows of {data.sequence_length} tokens"
            )
        return
    if isinstance(data, TFDS):
        _prepare_tfds(data)
    elif isinstance(data, TokenizedRecords):
        print(f"vocabulary: {data.open_tokenizer().vocab_size}")
        for split in ("train", "eval"):
            print(f"{split}: {len(data.open_checked(split))} rows")
    else:
        print(f"{type(data).__name__} data needs no preparation")


def _prepare_sets(data: Sequences) -> None:
    """Prepare the missing TFDS sets of a text."""
    from spmd.data import tfds

    for text in data.texts():
        directory = tfds.prepared_dir(text.tfds()) if text.name else None
        if text.name and (directory is None or not tfds.is_readable(directory)):
            _prepare_tfds(text.tfds())


def _prepare_tfds(data: Any) -> None:
    from spmd.data import tfds

    root = data_root(data.dir)
    directory = tfds.prepared_dir(data)
    if directory is not None and directory.is_relative_to(root) and tfds.is_readable(directory):
        print(f"{data.name} is prepared already, in {directory}")
        return
    tfds.prepare(data, root)
    print(f"{data.name} is prepared in {root}")


def _show(data: Any) -> None:
    import numpy as np

    for split in ("train", "eval"):
        source = data.open_checked(split)
        first = source.take(np.arange(1))
        print(f"{split}: {len(source)} examples")
        after = data.transformed_features(split) if data.transforms_of(split) else {}
        for feature, value in first.items():
            print(f"  {feature}: {_described(value)}{_transformed(after.get(feature))}")
        for feature in after.keys() - first.keys():
            print(f"  {feature}: added{_transformed(after[feature])}")
        if split == "train" and isinstance(data, Sequences):
            tokenizer = data.open_tokenizer()
            tokens = first["tokens"][0][first["segments"][0] > 0]
            print(f"vocabulary: {tokenizer.vocab_size}; the first window:")
            print(textwrap.indent(tokenizer.decode(tokens), "    "))
            continue
        if split == "train" and isinstance(data, TokenizedRecords):
            print(f"vocabulary: {data.open_tokenizer().vocab_size}; the first record:")
            values = next(data.records(split).read()).values
            for name, value in zip(data.columns, values, strict=True):
                print(textwrap.indent(f"{name}: {value}", "    "))
        _show_classes(data, source)
        if split == "train":
            _draw(first)


def _described(value: Any) -> str:
    """The type and shape of a feature's first example."""
    if isinstance(value, list) or value.dtype.hasobject:
        return f"encoded, first {len(value[0])} bytes"
    first = f", first {value[0]}" if value[0].size == 1 else ""
    return f"{value.dtype}{list(value.shape[1:])}{first}"


def _transformed(declared: Any) -> str:
    return f" -> {declared[1]}{list(declared[0])}" if declared else ""


def _show_classes(data: Any, source: Any) -> None:
    """Print how many examples each class has; of sources that must be read for it, of the first."""
    import numpy as np

    if data.features.get("label", ((0,), ""))[0] != ():
        return
    columns = getattr(source, "columns", {})
    num = len(source) if "label" in columns else min(len(source), COUNTED)
    labels = columns["label"] if "label" in columns else source.take(np.arange(num))["label"]
    of = "" if num == len(source) else f" of the first {num}"
    print(f"  classes{of}: {_counts(np.unique(labels, return_counts=True), data)}")


def _counts(counts: Any, data: Any) -> str:
    """`cat 12, dog 30`, at most 20 of them."""
    names = getattr(data, "classes", ())
    pairs = list(zip(*counts, strict=True))
    name_of = lambda value: names[value] if 0 <= value < len(names) else str(value)
    text = ", ".join(f"{name_of(int(value))} {num}" for value, num in pairs[:20])
    return text + (f" and {len(pairs) - 20} more" if len(pairs) > 20 else "")


def _draw_grid(data: Any, seed: int, out: Path) -> None:
    """Write the first training batch, after its transforms, as a picture."""
    from spmd.data import loader, picture

    source = data.open_checked("train")
    transform = data.pipeline("train", source, seed)
    options = {"batch_size": GRID, "seed": seed, "stop": 1, "transform": transform}
    batch = next(loader.train_batches(source, skips=data.skips("training"), **options))
    picture.draw(batch, out, getattr(data, "classes", ()))
    print(f"{out}: {GRID} training examples after their transforms")


def _check(data: Any, classes: Any) -> int:
    """Print the findings about each split; 1 where records are bad, or in both splits.

    classes: of the model, where it has a number of them.
    """
    from spmd.data import checking

    check(
        not isinstance(data, Sequences),
        "run.py data check reads the records of images, tables and arrays; a text has none",
    )
    checker, num_bad = checking.Checker(data, classes if isinstance(classes, int) else 0), 0
    for split in ("train", "eval"):
        report = checker.check(split, data.open_checked(split))
        num_bad += len(report.bad)
        print(f"{split}: {report.num} examples, {len(report.bad)} bad")
        for reason in report.bad[:SHOWN]:
            print(f"  {reason}")
        kinds = ", ".join(f"{kind} {num}" for kind, num in report.kinds.most_common() if num)
        if kinds:
            low_h, high_h, low_w, high_w = report.sizes
            print(f"  images: {kinds}; {low_h} to {high_h} pixels high, {low_w} to {high_w} wide")
        for feature, counts in report.labels.items():
            if len(counts) <= max(data.num_classes, 100):
                print(f"  {feature}: {_counts(zip(*sorted(counts.items()), strict=True), data)}")
        if report.masks:
            total = sum(report.masks.values())
            shares = [f"{v} {n / total:.1%}" for v, n in sorted(report.masks.items())[:20]]
            print(f"  mask values: {', '.join(shares)} of the pixels")
        _print_pairs(f"the same content twice in {split}", report.same)
    _print_pairs("the same content in both splits", checker.between)
    return 1 if num_bad or checker.between else 0


def _print_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    if pairs:
        print(f"{title}: {len(pairs)}")
        for pair in pairs[:SHOWN]:
            print(f"  {pair[0]} = {pair[1]}")


def _draw(first: dict[str, Any]) -> None:
    """Print the first image as characters."""
    for value in first.values():
        if isinstance(value, list) or value.dtype.hasobject:
            continue
        if value.ndim == 4 and value.shape[-1] == 1:
            for row in value[0, :, :, 0]:
                print("    " + "".join(" .:-=+*#%@"[int(v) * 9 // 255] * 2 for v in row))
