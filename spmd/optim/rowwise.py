"""Optimizers of the rows of sparse tables: only rows that a batch names change."""

# K distinct rows, D width

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from spmd.core.fields import check

if TYPE_CHECKING:
    import jax

Slots = dict[str, "jax.Array"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowWise:
    """Optimizer of the rows of sparse tables, with the schedule of the optimizer beside it.

    A row's gradient is summed over all examples that name it before the update; clipping, weight decay and
    the moving average do not apply to rows.
    """

    kind: Literal["adagrad", "sgd", "adam"] = "adagrad"
    """adagrad: row-wise, one number for each row; adam: moments of rows that no example names stay (lazy)."""
    rate: float = 1.0
    """Factor of the learning rate."""
    b1: float = 0.9
    """adam: decay of the first moment."""
    b2: float = 0.999
    """adam: decay of the second moment."""
    eps: float = 1e-8
    """adagrad, adam: added to the root."""
    narrow: bool = False
    """Rows are stored in bfloat16, rounded at random so that the mean is exact; sums and moments are not."""

    def __post_init__(self) -> None:
        check(self.rate >= 0, f"optimizer.rows.rate={self.rate} must not be negative")
        check(self.eps > 0, f"optimizer.rows.eps={self.eps} must be more than 0")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optimizer.rows.{name}={value} must be in [0, 1)")

    def slots(self, shape: tuple[int, ...], rows: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the optimizer's state of a table of this shape with so many rows, each initially 0."""
        if self.kind == "adagrad":
            return {"sum": (rows,)}
        return {"mu": shape, "nu": shape} if self.kind == "adam" else {}

    def update(
        self,
        rows_KD: jax.Array,
        slots: Slots,
        grads_KD: jax.Array,
        rate: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        """Update rows with the sums of their gradients.

        Args:
            rows_KD: [K, D].
            slots: the state of these rows, [K] or [K, D].
            grads_KD: [K, D] sums over all lookups of a row.
            rate: [] learning rate at this step, or [K, 1] that of each row.
            step: int32 [] number of steps before.

        Returns:
            (new rows, new state).
        """
        import jax.numpy as jnp

        rate = (self.rate * rate).astype(rows_KD.dtype)
        if self.kind == "sgd":
            return rows_KD - rate * grads_KD, {}
        if self.kind == "adagrad":  # as FBGEMM's exact row-wise Adagrad
            total_K = slots["sum"] + jnp.square(grads_KD).mean(-1)
            return rows_KD - rate * grads_KD / (jnp.sqrt(total_K)[:, None] + self.eps), {
                "sum": total_K
            }
        time = (step + 1).astype(rows_KD.dtype)
        mu = self.b1 * slots["mu"] + (1 - self.b1) * grads_KD
        nu = self.b2 * slots["nu"] + (1 - self.b2) * jnp.square(grads_KD)
        mean, square = mu / (1 - self.b1**time), nu / (1 - self.b2**time)
        return rows_KD - rate * mean / (jnp.sqrt(square) + self.eps), {"mu": mu, "nu": nu}
