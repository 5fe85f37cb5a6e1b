"""ImageNet-1k for an experiment: the prepared TFDS set, or a folder of classes."""

from __future__ import annotations

from typing import Literal

from spmd.data import TFDS, DataConfig
from spmd.data.images import Images
from spmd.data.transform import Transform

Kind = Literal["tfds", "folder"]


def imagenet(
    kind: Kind,
    transforms: tuple[Transform, ...],
    eval_transforms: tuple[Transform, ...],
    batch_size: int = 1024,
) -> DataConfig:
    """The config of the data.

    Args:
        kind: "tfds" is imagenet2012, evaluated on its validation split; "folder" is that of data.path.
        transforms: of training examples, decoding included.
        eval_transforms: of the examples that are evaluated.
        batch_size: images of an optimizer step.
    """
    common = {
        "batch_size": batch_size,
        "transforms": transforms,
        "eval_transforms": eval_transforms,
    }
    if kind == "folder":
        return Images(**common)
    features = {"image": ((), "bytes"), "label": ((), "int32")}
    return TFDS(name="imagenet2012", eval_split="validation", features=features, **common)
