"""Fields of an identity that older versions wrote by another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spmd.core.fields import flatten
from spmd.data.augment import Crop, Flip, Mixup
from spmd.data.transform import Transform

RENAMED = {"task.inputs": "task.features"}


def update(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as this version writes it."""
    return _with_transforms({RENAMED.get(k, k): v for k, v in identity.items()})


def _with_transforms(before: dict[str, Any]) -> dict[str, Any]:
    """The fields data.augment.* of older versions, as data.transforms, which replaced them."""
    augment = {k: v for k, v in before.items() if k.startswith("data.augment.")}
    if not augment:
        return before
    rest = {k: v for k, v in before.items() if k not in augment}
    transforms: list[Transform] = []
    if pixels := augment.get("data.augment.crop"):
        transforms.append(Crop(pixels))
    if augment.get("data.augment.flip"):
        transforms.append(Flip())
    if alpha := augment.get("data.augment.mixup"):
        transforms.append(Mixup(alpha))
    now = flatten(transforms) if transforms else {"": []}
    return rest | {f"data.transforms.{k}".rstrip("."): v for k, v in now.items()}
