"""run.py data prepare | show: the input data of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spmd import experiment
from spmd.data import TFDS, data_root
from spmd.fields import check, closest

ACTIONS = ("prepare", "show")


def run(name: str, words: Sequence[str]) -> int:
    """`prepare` runs the TFDS builder; `show` prints splits, features and an example."""
    words = list(words)
    action = words.pop(0) if words and not words[0].startswith("-") else ""
    check(
        action in ACTIONS,
        f"run.py data {action or '(nothing)'}: unknown action."
        f"{closest(action, ACTIONS)} Type: run.py data prepare|show --experiment NAME",
    )
    exp, _ = experiment.override(experiment.from_file(experiment.find(name)), words)
    if action == "prepare":
        _prepare(exp.data)
    else:
        _show(exp.data)
    return 0


def _prepare(data: Any) -> None:
    check(isinstance(data, TFDS), f"{type(data).__name__} data needs no preparation")
    from spmd.data import tfds

    tfds.prepare(data, data_root(data.dir))
    print(f"{data.name} is prepared in {data_root(data.dir)}")


def _show(data: Any) -> None:
    import numpy as np

    for split in ("train", "eval"):
        source = data.open(split)
        first = source.take(np.arange(1))
        print(f"{split}: {len(source)} examples")
        for feature, value in first.items():
            print(
                f"  {feature}: {value.dtype}{list(value.shape[1:])}"
                + (f", first {value[0]}" if value[0].size == 1 else "")
            )
        if split == "train":
            _draw(first)


def _draw(first: dict[str, Any]) -> None:
    """The first image in characters."""
    for value in first.values():
        if value.ndim == 4 and value.shape[-1] == 1:
            for row in value[0, :, :, 0]:
                print("    " + "".join(" .:-=+*#%@"[int(v) * 9 // 255] * 2 for v in row))
