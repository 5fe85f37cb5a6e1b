"""Optimizer and schedule configs that build optax transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from spmd.core.fields import check
from spmd.optim.base import Optimizer

if TYPE_CHECKING:
    import optax

    from spmd.optim.base import Dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with (Nesterov) momentum."""

    name: ClassVar[str] = "sgd"
    learning_rate: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum; 0 is plain SGD without a moment."""
    nesterov: bool = True
    """Nesterov's form (Sutskever et al. 2013)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions("momentum")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import optax

        return optax.trace(self.momentum, self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: ClassVar[str] = "adamw"
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, for arrays of two or more dims (no biases, no norms)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions("b1", "b2")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of a momentum; half of Adam's state (Chen et al. 2023, arXiv 2302.06675)."""

    name: ClassVar[str] = "lion"
    learning_rate: float = 1e-4
    """Peak learning rate; 3 to 10 times less than AdamW's."""
    b1: float = 0.9
    """Weight of the momentum in the update."""
    b2: float = 0.99
    """Decay of the momentum."""
    weight_decay: float = 1.0
    """Decoupled weight decay, for arrays of two or more dims; 3 to 10 times more than AdamW's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions("b1", "b2")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_lion(self.b1, self.b2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of hidden layers, AdamW for the rest (Jordan et al. 2024;
    scaled as Liu et al. 2025, arXiv 2502.16982).

    The rest: biases and norms, and what has a dim `vocab`, `classes` or `input` (embeddings, heads, the
    first layer). Kernels of more dims count as matrices from all dims but the last to the last
    (convolutions), or to heads x head_dim; `layers` and `experts` are stacks of matrices. A model without
    logical dims has Muon for all its arrays of two or more dims.
    """

    name: ClassVar[str] = "muon"
    momentum: float = 0.95
    """Decay of the momentum (Nesterov's form) that is orthogonalised."""
    num_iterations: int = 5
    """Newton-Schulz iterations."""
    rms: float = 0.2
    """Root mean square of a matrix's update; 0.2 is AdamW's, so that both share one learning rate."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.95
    """Decay of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, for arrays of two or more dims (no biases, no norms)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions("momentum", "b1", "b2")
        check(
            self.num_iterations >= 1,
            f"optimizer.num_iterations={self.num_iterations} must be at least 1",
        )
        check(self.rms > 0, f"optimizer.rms={self.rms} must be more than 0")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import math

        import optax
        from optax.contrib import MuonDimensionNumbers, scale_by_muon

        from spmd.core import tree

        def group(name: str, matrix: bool) -> str:
            leaf_dims = dims.get(name)
            return "muon" if matrix and (not leaf_dims or is_hidden_matrix(leaf_dims)) else "adamw"

        def sides(name: str, x: Any) -> MuonDimensionNumbers:
            return MuonDimensionNumbers(*matrix_axes(dims.get(name) or (None,) * x.ndim))

        def scale(name: str, x: Any) -> Any:
            # The root mean square of an orthogonal [m, n] is 1 / sqrt(max(m, n)).
            axes = matrix_axes(dims.get(name) or (None,) * x.ndim)
            largest = max(math.prod(x.shape[i] for i in side) for side in axes)
            return x * (self.rms * math.sqrt(largest))

        map_updates = lambda fn: lambda updates, params=None: tree.map_named(fn, updates)
        muon = optax.chain(
            scale_by_muon(
                beta=self.momentum,
                ns_steps=self.num_iterations,
                weight_dimension_numbers=map_updates(sides),
            ),
            optax.stateless(map_updates(scale)),
        )
        adamw = optax.scale_by_adam(self.b1, self.b2)
        return optax.partition({"muon": muon, "adamw": adamw}, tree.map_named(group, matrices))


def matrix_axes(dims: Sequence[str | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input axes, output axes) of a kernel as a matrix; `layers` and `experts` are stacks, in neither."""
    axes = [i for i, dim in enumerate(dims) if dim not in ("layers", "experts")]
    num_outputs = 2 if dims[-1] == "head_dim" and dims[-2] in ("heads", "kv_heads") else 1
    return tuple(axes[:-num_outputs]), tuple(axes[-num_outputs:])


def is_hidden_matrix(dims: tuple[str | None, ...]) -> bool:
    """Whether a parameter is a matrix of a hidden layer: no embedding, head, first layer or stacked bias."""
    return not {"vocab", "position", "classes", "input"} & {*dims} and bool(matrix_axes(dims)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Second moments of a matrix kept as a row and a column (Shazeer and Stern 2018, arXiv 1804.04235).

    Norms are taken over logical arrays: stacked layers count as one.
    """

    name: ClassVar[str] = "adafactor"
    learning_rate: float = 1e-2
    """Peak learning rate, relative to the root mean square of each array."""
    decay_rate: float = 0.8
    """Second moments decay by 1 - t ** -decay_rate at step t."""
    min_dim_factored: int = 128
    """Arrays whose second largest dim is smaller keep an unfactored second moment."""
    clip_rms: float = 1.0
    """Clips the root mean square of each array's update to this; 0 is off."""
    momentum: float = 0.0
    """Decay of a first moment; 0 keeps none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fractions("momentum")
        check(
            0 < self.decay_rate <= 1,
            f"optimizer.decay_rate={self.decay_rate} must be in (0, 1]",
        )
        check(
            self.min_dim_factored >= 1,
            f"optimizer.min_dim_factored={self.min_dim_factored} must be at least 1",
        )
        check(self.clip_rms >= 0, f"optimizer.clip_rms={self.clip_rms} must not be negative")

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        import optax

        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_factored
            )
        ]
        if self.clip_rms:
            parts.append(optax.clip_by_block_rms(self.clip_rms))
        parts.append(optax.scale_by_param_block_rms())
        if self.momentum:
            parts.append(optax.ema(self.momentum, debias=False))
        return optax.chain(*parts)


def decay_mask(params: Any, dims: dict[str, Any]) -> Any:
    """True where weight decay applies: matrices, but no biases, stacked ones included."""
    from spmd.core import tree

    def decays(name: str, x: Any) -> bool:
        leaf_dims = dims.get(name)
        return bool(matrix_axes(leaf_dims)[0]) if leaf_dims else len(x.shape) >= 2

    return tree.map_named(decays, params)
