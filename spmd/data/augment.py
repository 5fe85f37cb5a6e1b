"""Image augmentation: whole batches in numpy, each draw a hash of (seed, draw, stream position).

So an example is augmented the same way whatever processes, threads, devices or steps per dispatch read
it and wherever the run resumed, and in each epoch another way. Evaluation never augments.
"""

# N examples of this process, H height, W width, C channels, P padding on each side

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spmd.data import DataConfig, Source
from spmd.data.skips import Skips

Batch = dict[str, Any]
Transform = Callable[[Batch, np.ndarray], Batch]
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of uint64 that scatters all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, draw: int, position_N: np.ndarray) -> np.ndarray:
    """[N] float64 in [0, 1): a pure function of its arguments, independent over each of them."""
    key_1 = _mix(np.array([seed % 2**64], np.uint64) + _GAMMA)
    key_1 = _mix(key_1 + np.array([draw + 1], np.uint64) * _GAMMA)
    bits_N = _mix(key_1 + (position_N.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits_N >> np.uint64(11)) * 2.0**-53


def crop(image_NHWC: np.ndarray, padding: int, y_N: np.ndarray, x_N: np.ndarray) -> np.ndarray:
    """Pads with zeros on each side and cuts H x W at (y, x), 0 <= y, x <= 2 * padding."""
    n, h, w, c = image_NHWC.shape
    p = padding
    padded = np.zeros((n, h + 2 * p, w + 2 * p, c), image_NHWC.dtype)
    padded[:, p : p + h, p : p + w] = image_NHWC
    # Rows as one run of W * C values: numpy then copies runs instead of pixels.
    rows = padded.reshape(n, h + 2 * p, (w + 2 * p) * c)
    windows = np.lib.stride_tricks.sliding_window_view(rows, (h, w * c), axis=(1, 2))
    return windows[np.arange(n), y_N, x_N * c].reshape(n, h, w, c)


def flip(image_NHWC: np.ndarray, which_N: np.ndarray) -> np.ndarray:
    """Mirrors left and right where `which_N` holds."""
    _, _, w, c = image_NHWC.shape
    columns = (np.arange(w)[::-1, None] * c + np.arange(c)).ravel()
    out = image_NHWC.reshape(*image_NHWC.shape[:2], w * c).copy()
    out[which_N] = out[which_N].take(
        columns, axis=2
    )  # twice as fast as a view with negative stride
    return out.reshape(image_NHWC.shape)


def transform(
    config: DataConfig, source: Source, seed: int, skips: Skips | None = None
) -> Transform | None:
    """(batch, position_N) -> batch as config.augment says; None when it says nothing.

    source: where mixup draws its partners. skips: bad records that may pass.
    """
    skips = skips or Skips()
    how = config.augment
    if not how.active:
        return None
    name = config.image()
    labels = config.labels()

    def moved(image_NHWC: np.ndarray, position_N: np.ndarray, draw: int) -> np.ndarray:
        if how.crop:
            y_N, x_N = (
                (uniform(seed, draw + i, position_N) * (2 * how.crop + 1)).astype(np.int64)
                for i in range(2)
            )
            image_NHWC = crop(image_NHWC, how.crop, y_N, x_N)
        if how.flip:
            image_NHWC = flip(image_NHWC, uniform(seed, draw + 2, position_N) < 0.5)
        return image_NHWC

    def mixed(batch: Batch, position_N: np.ndarray) -> Batch:
        from scipy.special import betaincinv

        u_N = uniform(seed, 3, position_N)
        mix_N = betaincinv(how.mixup, how.mixup, u_N).astype(
            np.float32
        )  # the inverse of Beta's CDF
        partners_N = (uniform(seed, 4, position_N) * len(source)).astype(np.int64)
        other, good_N = skips.take(source, partners_N)
        mix_N = np.where(good_N, mix_N, np.float32(1))  # a bad record is nobody's partner
        image, b = _real(batch[name]), _real(moved(other[name], position_N, 5))
        image -= b  # b + share * (a - b), in place: fresh memory costs more than the arithmetic
        image *= mix_N.astype(image.dtype)[:, None, None, None]
        image += b
        return (
            batch | {name: image, "mix": mix_N} | {f"{label}_b": other[label] for label in labels}
        )

    def apply(batch: Batch, position_N: np.ndarray) -> Batch:
        batch = batch | {name: moved(batch[name], position_N, 0)}
        return mixed(batch, position_N) if how.mixup else batch

    return apply


def _real(image: np.ndarray) -> np.ndarray:
    """A copy in floating values as the tasks see them: uint8 is scaled to [0, 1]."""
    if np.issubdtype(image.dtype, np.floating):
        return image.copy()
    return np.true_divide(image, 255 if image.dtype == np.uint8 else 1, dtype=np.float32)
