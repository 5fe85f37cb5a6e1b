"""Optimizers for large batches: a trust ratio for each layer (LAMB, LARS)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from spmd.core.fields import check
from spmd.optim.optimizers import SGD, AdamW

if TYPE_CHECKING:
    import optax

    from spmd.optim.base import Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(AdamW):
    """Adam whose update of each layer has the norm of its weights, times the learning rate; for batches of
    thousands (You et al. 2020, arXiv 1904.00962). A layer: as in trust_ratio.
    """

    name: ClassVar[str] = "lamb"
    learning_rate: float = 2e-3
    """Peak learning rate: the norm of a layer's update over that of its weights."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decay of arrays of two or more dims, within the update that is scaled."""

    def after_decay(self, matrices: Any, dims: Dims) -> list[optax.GradientTransformation]:
        return [trust_ratio(1.0, matrices, dims)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LARS(SGD):
    """Momentum whose update of each layer has the norm of its weights, times trust and learning rate; for
    image models in large batches (You et al. 2017, arXiv 1708.03888). A layer: as in trust_ratio.
    """

    name: ClassVar[str] = "lars"
    learning_rate: float = 10.0
    """Peak learning rate; that of biases and norms too, times trust."""
    trust: float = 1e-3
    """The norm of a layer's update over that of its weights, before the learning rate."""
    nesterov: bool = False
    """Nesterov's form (Sutskever et al. 2013)."""
    weight_decay: float = 1e-4
    """Decay of arrays of two or more dims, within the update that is scaled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.trust > 0, f"optimizer.trust={self.trust} must be more than 0")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import optax

        return optax.identity()

    def after_decay(self, matrices: Any, dims: Dims) -> list[optax.GradientTransformation]:
        # Momentum after the ratio, before the learning rate: as SGD has it, right while the rate changes.
        return [trust_ratio(self.trust, matrices, dims), super().direction(matrices, dims)]


def trust_ratio(trust: float, matrices: Any, dims: Dims) -> optax.GradientTransformation:
    """Scale the update of each layer to `trust` times the norm of its weights.

    A layer is an array in `matrices`, each slice along its stacked dims (`layers`, `experts`) by itself, so
    that stacked equals unstacked; a layer of zeros keeps its update. Others (biases, norms) are scaled by
    `trust` alone. Takes logical arrays under jit: the norm of a shard would be wrong.

    Args:
        trust: norm of an update over that of the weights.
        matrices: tree of bools, structured as the parameters.
        dims: logical dims by parameter name.
    """
    import jax.numpy as jnp
    import optax

    from spmd.core import tree

    def scale(name: str, update: Any, param: Any, matrix: bool) -> Any:
        if not matrix:
            return update * trust
        leaf_dims = dims.get(name) or (None,) * param.ndim
        axes = tuple(i for i, dim in enumerate(leaf_dims) if dim not in ("layers", "experts"))
        dtype = tree.at_least_float32(param.dtype)
        length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(dtype)), axis=axes, keepdims=True))
        param_norm, update_norm = length(param), length(update)
        nonzero = (param_norm > 0) & (update_norm > 0)
        ratio = jnp.where(nonzero, param_norm / jnp.where(nonzero, update_norm, 1), 1)
        return (update.astype(dtype) * ratio * trust).astype(update.dtype)

    return optax.stateless(
        lambda updates, params=None: tree.map_named(scale, updates, params, matrices)
    )
