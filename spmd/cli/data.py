"""run.py data prepare | show: the input data of an experiment."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from spmd.core.fields import check, closest
from spmd.data import TFDS, data_root
from spmd.data.text import Sequences
from spmd.experiment import registry

ACTIONS = ("prepare", "show")


def run(name: str, words: Sequence[str]) -> int:
    """`prepare` runs the TFDS builder and tokenizes text; `show` prints splits, features and an example."""
    words = list(words)
    action = words.pop(0) if words and not words[0].startswith("-") else ""
    check(
        action in ACTIONS,
        f"run.py data {action or '(nothing)'}: unknown action."
        f"{closest(action, ACTIONS)} Type: run.py data prepare|show --experiment NAME",
    )
    exp, _ = registry.load(name, words)
    if action == "prepare":
        _prepare(exp.data)
    else:
        _show(exp.data)
    return 0


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
        for feature, value in first.items():
            print(
                f"  {feature}: {value.dtype}{list(value.shape[1:])}"
                + (f", first {value[0]}" if value[0].size == 1 else "")
            )
        if split == "train" and isinstance(data, Sequences):
            tokenizer = data.open_tokenizer()
            tokens = first["tokens"][0][first["segments"][0] > 0]
            print(f"vocabulary: {tokenizer.vocab_size}; the first window:")
            print(textwrap.indent(tokenizer.decode(tokens), "    "))
        elif split == "train":
            _draw(first)


def _draw(first: dict[str, Any]) -> None:
    """Print the first image as characters."""
    for value in first.values():
        if value.ndim == 4 and value.shape[-1] == 1:
            for row in value[0, :, :, 0]:
                print("    " + "".join(" .:-=+*#%@"[int(v) * 9 // 255] * 2 for v in row))
