"""Pictures of a few evaluation examples: predictions beside their truth."""

# N examples

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from spmd.core.batches import Expected
from spmd.data import loader, picture
from spmd.data.sources import ArraySource
from spmd.runtime import agree
from spmd.tasks.picture import Picture
from spmd.train.evaluate import predictor
from spmd.train.program import Program

WRONG = "firebrick"  # colour of a predicted class that is not the true one


class Pictures:
    """Draws the same examples at each evaluation: `num` of the source, at equal distances.

    Each process reads them once; the prediction is sharded over the mesh as every other is.
    """

    def __init__(self, program: Program, source: Any, num: int):
        self._task, self._names = program.task, getattr(program.data, "classes", ())
        self._given: dict[str, np.ndarray] = {}
        if num:
            self._given = _read(program, source, min(num, len(source)))
            self._predict = predictor(program.task, program.mesh, len(self._given["weight"]))

    def draw(self, params: Any, model_state: Any, tables: Any) -> bytes:
        """A PNG, in process 0; empty elsewhere, and where the task draws nothing. Called by all processes.

        params, model_state, tables: as they are evaluated.
        """
        if not self._given:
            return b""
        source, expected = ArraySource(self._given), Expected("evaluation")
        parts = self._predict(params, model_state, tables, source, expected, None)
        outputs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        shown = self._task.picture(self._given, outputs)
        if shown is None:
            self._given = {}
        if shown is None or (agree.has_peers() and not agree.is_first()):
            return b""
        return render(shown, self._names)


class _Some:
    """`num` examples of a source, at equal distances."""

    def __init__(self, source: Any, num: int):
        self._source = source
        self._index_N = np.linspace(0, len(source) - 1, num).astype(np.int64)
        name_of = getattr(source, "name_of", str)
        self.name_of = lambda i: name_of(int(self._index_N[i]))

    def __len__(self) -> int:
        return len(self._index_N)

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        return self._source.take(self._index_N[indices])


def _read(program: Program, source: Any, num: int) -> dict[str, np.ndarray]:
    """The examples after the transforms of the evaluation."""
    some, skips = _Some(source, num), program.data.skips("evaluation")
    transform = program.evaluation_transform(some, skips)
    options = {"expected": program.expected("evaluation"), "transform": transform}
    return next(loader.eval_batches(some, batch_size=num, skips=skips, **options))


def render(shown: Picture, names: tuple[str, ...] = ()) -> bytes:
    """The PNG of a picture.

    Args:
      shown: examples of a task and their predictions.
      names: of the classes; others are numbers.

    Returns:
      The file: for each example its image, its masks, and its classes and numbers below.
    """
    image = picture.to_rgb(np.asarray(shown.image))
    masks = [picture.overlay(image, np.asarray(mask)) for mask in shown.masks.values()]
    name_of = lambda i: names[i] if 0 <= i < len(names) else str(i)
    captions: list[list[tuple[str, str]]] = []
    for row in range(len(image)):
        lines: list[tuple[str, str]] = []
        chosen = {title: int(number[row]) for title, number in shown.classes.items()}
        right = len(set(chosen.values())) == 1
        for i, (title, number) in enumerate(chosen.items()):
            lines.append((f"{title} {name_of(number)}", "black" if right or not i else WRONG))
        for title, values in shown.numbers.items():
            numbers = " ".join(f"{x:.3g}" for x in np.ravel(values[row])[:8])
            lines.append((f"{title} {numbers}", "black"))
        captions.append(lines)
    titles = ["image", *shown.masks] if masks else []
    return picture.draw_panels([image, *masks], captions, titles)
