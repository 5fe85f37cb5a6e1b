"""Fields that an experiment takes from its data: the names of the classes, and their number for the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spmd.core.fields import check

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment

# Placeholder number of classes while planning without data; the size of the last layer depends on it.
UNREAD_CLASSES = 10


def derive(
    exp: Experiment, recorded: Mapping[str, Any] | None = None, *, planned: bool = False
) -> Experiment:
    """The experiment with `data.classes`, and with `model.classes` (or a size of the data) in place of 0.

    Args:
      exp: the experiment.
      recorded: the identity of a run, which has them; None: they are read from the training data.
      planned: a plan, which does without data where none is named.

    Raises:
      ValueError: the model has model.classes=0, and the data no classes.
    """
    data, model = exp.data, exp.model
    unknown = getattr(model, "classes", None) == 0 and getattr(model, "has_classes", True)
    unsized = [name for name in data.sizes if getattr(model, name, None) == 0]
    named = getattr(data, "path", "") or getattr(data, "files", ())
    if recorded is not None:
        prefix = "data."
        names = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
        data = data.found(names)
    elif not planned or ((unknown or unsized) and named):
        data = data.found()
    if unknown:
        num = data.num_classes or (UNREAD_CLASSES if planned else 0)
        check(
            num > 0,
            f"model.classes=0 is the number of classes of the data, and {type(data).__name__} data knows"
            " none; give --model.classes N"
            + ("" if getattr(data, "path", "set") else ", or name the images: --data.path DIR"),
        )
        model = dataclasses.replace(model, classes=num)
    if unsized:
        model = dataclasses.replace(model, **{name: data.sizes[name] for name in unsized})
    if data is exp.data and model is exp.model:
        return exp
    return dataclasses.replace(exp, data=data, model=model)
