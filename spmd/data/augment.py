"""Transforms that vary images: crop, flip, mixup."""

# N examples of this process, H height, W width, C channels, P padding on each side

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from spmd.core.fields import check, closest
from spmd.data import ragged
from spmd.data.transform import Batch, Draws, Transform

if TYPE_CHECKING:
    from spmd.data import Features


@dataclasses.dataclass(frozen=True)
class Crop(Transform):
    """Pads images with zeros on each side and cuts the old size at a random place."""

    name: ClassVar[str] = "crop"
    draw_numbers: ClassVar[tuple[int, ...]] = (0,)

    pixels: int
    """Padding on each side."""
    images: tuple[str, ...] = ()
    """Features [H, W, ...] that move together; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(self.pixels >= 1, f"crop: pixels={self.pixels} must be at least 1")

    def features(self, features: Features) -> Features:
        """The same: the size does not change."""
        names = moved_names(self, self.images, {k: shape for k, (shape, _) in features.items()})
        height, width = features[names[0]][0][:2]
        check(
            self.pixels < min(height, width),
            f"crop: pixels={self.pixels} must be less than the image's {height} x {width} pixels",
        )
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with the images cut, each example's at one place."""
        y_N, x_N = ((draws.uniform() * (2 * self.pixels + 1)).astype(np.int64) for _ in range(2))
        names = moved_names(self, self.images, example_shapes(batch))
        return batch | {name: crop(batch[name], self.pixels, y_N, x_N) for name in names}


@dataclasses.dataclass(frozen=True)
class Flip(Transform):
    """Mirrors half of the images, left and right."""

    name: ClassVar[str] = "flip"
    draw_numbers: ClassVar[tuple[int, ...]] = (2,)

    images: tuple[str, ...] = ()
    """Features [H, W, ...] that move together; empty is the one feature [H, W, C]."""

    def features(self, features: Features) -> Features:
        """The same."""
        moved_names(self, self.images, {k: shape for k, (shape, _) in features.items()})
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with half of the examples mirrored."""
        which_N = draws.uniform() < 0.5
        names = moved_names(self, self.images, example_shapes(batch))
        return batch | {name: flip(batch[name], which_N) for name in names}


@dataclasses.dataclass(frozen=True)
class Mixup(Transform):
    """Blends two images and their losses by a share from Beta(alpha, alpha) (Zhang et al. 2018).

    Adds `mix`, the share of the example, and `label_b` for each label, the partner's.
    """

    name: ClassVar[str] = "mixup"
    partners: ClassVar[int] = 1
    draw_numbers: ClassVar[tuple[int, ...]] = (3, 5)

    alpha: float
    """Parameter of the Beta distribution: near 0 keeps one of the two, 1 is uniform."""
    image: str = ""
    """Feature that is blended; empty is the one feature [H, W, C]."""

    def __post_init__(self) -> None:
        check(self.alpha > 0, f"mixup: alpha={self.alpha} must be more than 0")

    def features(self, features: Features) -> Features:
        """The image in floating values, `mix`, and a `_b` for each label."""
        name = image_name(self, self.image, {k: shape for k, (shape, _) in features.items()})
        features = with_partner_labels(self, features)
        shape, dtype = features[name]
        return {**features, name: (shape, dtype if "float" in dtype else "float32")}

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """The batch blended with the partners; a bad record is nobody's partner."""
        from scipy.special import betaincinv

        # The inverse of Beta's cumulative distribution.
        mix_N = betaincinv(self.alpha, self.alpha, draws.uniform()).astype(np.float32)
        ((other, good_N),) = draws.partners
        mix_N = np.where(good_N, mix_N, np.float32(1))
        name = image_name(self, self.image, example_shapes(batch))
        image, b = as_floating(batch[name]), as_floating(other[name])
        image -= b  # b + share * (a - b), in place: fresh memory costs more than the arithmetic
        image *= mix_N.astype(image.dtype).reshape(-1, *[1] * (image.ndim - 1))
        image += b
        return batch | partner_labels(batch, other) | {name: image, "mix": mix_N}


def with_partner_labels(transform: Transform, features: Features) -> Features:
    """The features, `mix`, and a `_b` for each label; ValueError without a label."""
    labels = [k for k, (s, d) in features.items() if not s and "int" in d]
    check(
        bool(labels),
        f"{transform.name} needs a label, an integer feature of shape []; the features are"
        f" {', '.join(f'{k} {d}{list(s)}' for k, (s, d) in features.items())}",
    )
    added = {f"{label}_b": features[label] for label in labels} | {"mix": ((), "float32")}
    for new in added:
        check(
            new not in features,
            f"with {transform.name} the feature name {new!r} is the loader's own",
        )
    return {**features, **added}


def partner_labels(batch: Batch, other: Batch) -> Batch:
    """The labels of the partners: {`label_b`: [N]}."""
    return {
        f"{k}_b": other[k]
        for k, x in batch.items()
        if x.ndim == 1 and np.issubdtype(x.dtype, np.integer)
    }


def example_shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    """{feature: shape of an example} of a batch; of images not decoded yet, with -1 for the sizes."""
    return {
        name: (ragged.UNKNOWN, ragged.UNKNOWN, *x[0].shape[2:])
        if x.dtype.hasobject and hasattr(x[0], "shape")
        else x.shape[1:]
        for name, x in batch.items()
    }


def image_name(
    transform: Transform,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    sized: bool = True,
) -> str:
    """`name`, or that of the one feature of shape [H, W, C]; ValueError when there is none, or more.

    sized: ValueError also where its height and width differ among the examples.
    """
    shown = ", ".join(f"{k} {list(shape)}" for k, shape in shapes.items()) or "none"
    if name:
        check(
            name in shapes,
            f"{transform.name}: there is no feature {name!r}.{closest(name, shapes)} The features are"
            f" {shown}",
        )
        check(not sized or ragged.UNKNOWN not in shapes[name], _unsized(transform, name))
        return name
    images = [k for k, shape in shapes.items() if len(shape) == 3]
    check(
        len(images) == 1,
        f"{transform.name} needs one image, a feature of shape [H, W, C], or the name of one; the features"
        f" are {shown}",
    )
    check(not sized or ragged.UNKNOWN not in shapes[images[0]], _unsized(transform, images[0]))
    return images[0]


def _unsized(transform: Transform, name: str) -> str:
    return (
        f"{transform.name}: the images of {name!r} differ in size; put resize:PIXELS, central_crop:PIXELS or"
        " random_resized_crop:PIXELS before it"
    )


def moved_names(
    transform: Transform,
    names: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    sized: bool = True,
) -> tuple[str, ...]:
    """The features that a transform moves: `names`, or the one of shape [H, W, C].

    sized: as image_name takes it.

    Raises:
      ValueError: a feature is missing or no image, their sizes differ, or another feature of the image's
        size would silently stay where it is.
    """
    if not names:
        image = image_name(transform, "", shapes, sized=sized)
        beside = [k for k, s in shapes.items() if k != image and s[:2] == shapes[image][:2]]
        check(
            not beside,
            f"{transform.name} would move {image} and not {', '.join(beside)} of the same size; name all that"
            f" move, {'+'.join([image, *beside])}, or only {image}",
        )
        return (image,)
    for name in names:
        image_name(transform, name, shapes, sized=sized)
    sizes = {name: list(shapes[name][:2]) for name in names}
    check(
        all(len(size) == 2 for size in sizes.values()),
        f"{transform.name} moves features of shape [H, W, ...]; those named are"
        f" {', '.join(f'{name} {list(shapes[name])}' for name in names)}",
    )
    check(
        len(set(map(tuple, sizes.values()))) == 1,
        f"{transform.name} moves features of one height and width; those named are"
        f" {', '.join(f'{name} {size}' for name, size in sizes.items())}",
    )
    return names


def crop(image: np.ndarray, padding: int, y_N: np.ndarray, x_N: np.ndarray) -> np.ndarray:
    """[N, H, W, ...] padded with zeros on each side and cut to H x W at (y, x), 0 <= y, x <= 2 * padding."""
    n, h, w = image.shape[:3]
    c = int(np.prod(image.shape[3:]))
    p = padding
    padded = np.zeros((n, h + 2 * p, w + 2 * p, c), image.dtype)
    padded[:, p : p + h, p : p + w] = image.reshape(n, h, w, c)
    # Rows as one run of W * C values: numpy then copies runs instead of pixels.
    rows = padded.reshape(n, h + 2 * p, (w + 2 * p) * c)
    windows = np.lib.stride_tricks.sliding_window_view(rows, (h, w * c), axis=(1, 2))
    return windows[np.arange(n), y_N, x_N * c].reshape(image.shape)


def flip(image: np.ndarray, which_N: np.ndarray) -> np.ndarray:
    """[N, H, W, ...] mirrored left and right where `which_N` holds."""
    n, h, w = image.shape[:3]
    c = int(np.prod(image.shape[3:]))
    columns = (np.arange(w)[::-1, None] * c + np.arange(c)).ravel()
    out = image.reshape(n, h, w * c).copy()
    # Twice as fast as a view with negative stride; "clip" spares a buffer, no column is outside.
    out[which_N] = out[which_N].take(columns, axis=2, mode="clip")
    return out.reshape(image.shape)


def as_floating(image: np.ndarray) -> np.ndarray:
    """A copy in floating values as the tasks see them: uint8 is scaled to [0, 1]."""
    if np.issubdtype(image.dtype, np.floating):
        return image.copy()
    return np.true_divide(image, 255 if image.dtype == np.uint8 else 1, dtype=np.float32)
