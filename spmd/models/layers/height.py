"""Windows over images whose height is sharded: neighbours exchange the rows at their edges.

XLA's partitioner (jax 0.10) computes twice the sum, and no error, for a convolution whose batch, height and
channels are all sharded. So each device runs it on its own rows, with collectives by hand.
"""

# B batch, H height, W width, C channels, F output channels

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from spmd.core.fields import check
from spmd.parallel import collectives, scope

HEIGHT = "height"


def height_dim(x_BHWC: jax.Array) -> str | None:
    """The logical dim of the rows of images: those of low layers that do not divide are not sharded.

    Args:
        x_BHWC: images [B, H, W, C].

    Returns:
        `height`, or None.
    """
    return HEIGHT if x_BHWC.shape[1] % scope.num_shards(HEIGHT) == 0 else None


def check_rows(x_BHWC: jax.Array) -> None:
    """Check that the rows of images divide among the devices.

    Args:
        x_BHWC: images [B, H, W, C].

    Raises:
        ValueError: they do not.
    """
    num, rows = scope.num_shards(HEIGHT), x_BHWC.shape[1]
    sizes = [str(n) for n in range(1, rows + 1) if rows % n == 0]
    check(
        rows % num == 0,
        f"mesh.context={num} shards the height of images, and does not divide their {rows} rows; use one of"
        f" {', '.join(sizes[:8])}, or resize or crop them to a multiple of {num} rows",
    )


def by_rows(
    window: Callable[..., jax.Array],
    x_BHWC: jax.Array,
    kernel: jax.Array | None = None,
    *,
    size: int,
    stride: int,
    above: int,
    dims: tuple[str | None, str | None] = (None, None),
    fill: float = 0.0,
) -> jax.Array:
    """Run a function of windows on each device's rows, where `height` is sharded; else on all rows.

    Args:
        window: (images [B, H, W, C], kernel if there is one) -> [B, H / stride, W / stride, F], each window
            from `above` rows before a multiple of `stride`, padded with `fill`.
        x_BHWC: images.
        kernel: [size, size, C, F]; None for a function without one.
        size: rows of a window.
        stride: rows between windows.
        above: rows of a window before those of its stride.
        dims: logical dims of C and F.
        fill: what the function pads with.

    Returns:
        [B, H / stride, W / stride, F].
    """
    arrays = () if kernel is None else (kernel,)
    below = max(size - stride - above, 0)
    # Whole strides, so that windows begin where they do in the image; the rows beyond are cut off again.
    above, below = (-(-rows // stride) * stride for rows in (above, below))
    num, rows = scope.num_shards(HEIGHT), x_BHWC.shape[1]
    if num == 1 or rows % (num * stride) or rows // num < max(above, below):
        return window(x_BHWC, *arrays)
    axes = tuple(scope.sharding_axes(HEIGHT))
    summed = tuple(scope.sharding_axes(dims[0])) if kernel is not None and dims[0] else ()

    def block(x_BHWC: jax.Array, *arrays: jax.Array) -> jax.Array:
        rows = x_BHWC.shape[1]
        x_BHWC = collectives.exchange_halo(x_BHWC, axes, above, below, dim=1, fill=fill)
        y_BHWF = window(x_BHWC, *arrays)[:, above // stride :][:, : rows // stride]
        return jax.lax.psum(y_BHWF, summed) if summed else y_BHWF

    images: Any = ("batch", HEIGHT, None, dims[0]), ("batch", HEIGHT, None, dims[1])
    kernels: Any = (("conv", "conv", *dims),) if arrays else ()
    return scope.blockwise(block, (images[0], *kernels), images[1])(x_BHWC, *arrays)
