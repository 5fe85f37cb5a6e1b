"""Optimizer and schedule configs that build optax transformations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spmd.fields import check, closest

# Logical dims by parameter name, None where a parameter has none (tasks.Task.dims).
Dims = Mapping[str, tuple[str, ...] | None]

if TYPE_CHECKING:
    import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer has: a learning-rate schedule, clipping, decoupled weight decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant, cosine to the end, or warm-up-stable-decay (linear)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0; with base-batch-size, from the rate of that."""
    base_batch_size: int = 0
    """Batch size that learning-rate is for: a larger batch takes a rate as much larger (Goyal et al. 2017);
    0 is off."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak (cosine, wsd)."""
    decay_fraction: float = 0.2
    """The last part of the run over which wsd decays."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for arrays of two or more dims (no biases, no norms)."""
    clip_norm: float = 0.0
    """Clips the global gradient norm to this; 0 is off."""
    ema: float = 0.0
    """Decay of the moving average of the parameters that is evaluated; 0 is off."""

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "weight_decay",
            "clip_norm",
            "warmup_steps",
            "base_batch_size",
            "final_fraction",
        ):
            value = getattr(self, name)
            check(value >= 0, f"optimizer.{name}={value} must not be negative")
        check(
            0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must be in (0, 1]",
        )
        self._fractions("ema")

    def _fractions(self, *names: str) -> None:
        """Checks that the fields `names` are in [0, 1)."""
        for name in names:
            value = getattr(self, name)
            check(0 <= value < 1, f"optimizer.{name}={value} must be in [0, 1)")

    def rate(self, num_steps: int, batch_size: int = 0) -> optax.Schedule:
        """Learning rate at each step of a run of `num_steps`; ValueError when it ends in the warm-up.

        batch_size: examples of a step, by which base_batch_size scales the rate.
        """
        import jax.numpy as jnp
        import optax

        check(
            self.warmup_steps <= num_steps,
            f"optimizer.warmup_steps={self.warmup_steps} is more than the {num_steps} steps of the run"
            " (train.steps or train.epochs): warm up for less, or train for longer",
        )
        scaled = self.base_batch_size and batch_size
        peak = self.learning_rate * (batch_size / self.base_batch_size if scaled else 1)
        final = peak * self.final_fraction
        rest = max(num_steps - self.warmup_steps, 1)
        if self.schedule == "constant":
            main = optax.constant_schedule(peak)
        elif self.schedule == "cosine":
            main = optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction)
        else:
            decay = max(round(rest * self.decay_fraction), 1)
            main = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
        if self.warmup_steps:
            first = min(self.learning_rate, peak) if scaled else 0.0
            warmup = optax.linear_schedule(first, peak, self.warmup_steps)
            main = optax.join_schedules([warmup, main], [self.warmup_steps])
        # A float count: optax would mix an integer one with floats, which strict promotion refuses.
        # float64 where that is on: the last bit of a float32 cosine depends on the program around it.
        return lambda count: jnp.asarray(main(jnp.asarray(count, float)), float)

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        """The transformation before learning rate and weight decay; each optimizer's own.

        matrices, dims: decay_mask and dims as `build` takes them.
        """
        raise NotImplementedError

    def after_decay(self, matrices: Any, dims: Dims) -> list[optax.GradientTransformation]:
        """What follows weight decay, before the learning rate; arguments as those of `direction`."""
        return []

    def build(
        self, num_steps: int, decay_mask: Any, dims: Dims | None = None, batch_size: int = 0
    ) -> optax.GradientTransformation:
        """optax transformation; decay_mask: tree of bools like the parameters, dims: logical dims by
        parameter name (Task.dims), for the optimizers that tell hidden layers from others, batch_size: as
        `rate` takes it.
        """
        import optax

        from spmd import narrow

        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts.append(self.direction(decay_mask, dims or {}))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=decay_mask))
        parts += self.after_decay(decay_mask, dims or {})
        rate = self.rate(num_steps, batch_size)
        return narrow.in_float32(optax.chain(*parts, optax.scale_by_learning_rate(rate)))


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

        from spmd import tree

        def group(name: str, matrix: bool) -> str:
            known = dims.get(name)
            return "muon" if matrix and (not known or is_hidden_matrix(known)) else "adamw"

        def sides(name: str, x: Any) -> MuonDimensionNumbers:
            return MuonDimensionNumbers(*matrix_axes(dims.get(name) or (None,) * x.ndim))

        def scale(name: str, x: Any) -> Any:
            # The root mean square of an orthogonal [m, n] is 1 / sqrt(max(m, n)).
            axes = matrix_axes(dims.get(name) or (None,) * x.ndim)
            largest = max(math.prod(x.shape[i] for i in side) for side in axes)
            return x * (self.rms * math.sqrt(largest))

        of_updates = lambda fn: lambda updates, params=None: tree.map_named(fn, updates)
        muon = optax.chain(
            scale_by_muon(
                beta=self.momentum,
                ns_steps=self.num_iterations,
                weight_dimension_numbers=of_updates(sides),
            ),
            optax.stateless(of_updates(scale)),
        )
        adamw = optax.scale_by_adam(self.b1, self.b2)
        return optax.partition({"muon": muon, "adamw": adamw}, tree.map_named(group, matrices))


def matrix_axes(dims: Sequence[str | None]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input axes, output axes) of a kernel as a matrix; `layers` and `experts` are stacks, in neither."""
    axes = [i for i, dim in enumerate(dims) if dim not in ("layers", "experts")]
    out = 2 if dims[-1] == "head_dim" and dims[-2] in ("heads", "kv_heads") else 1
    return tuple(axes[:-out]), tuple(axes[-out:])


def is_hidden_matrix(dims: tuple[str, ...]) -> bool:
    """Neither an embedding, a head or a first layer, nor a bias of stacked or attention layers."""
    return not {"vocab", "position", "classes", "input"} & {*dims} and bool(matrix_axes(dims)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Second moments of a matrix kept as a row and a column (Shazeer and Stern 2018, arXiv 1804.04235).

    Norms are taken over whole arrays: stacked layers count as one.
    """

    name: ClassVar[str] = "adafactor"
    learning_rate: float = 1e-2
    """Peak learning rate, relative to the root mean square of each array."""
    decay_rate: float = 0.8
    """Second moments decay by 1 - t ** -decay_rate at step t."""
    min_dim_factored: int = 128
    """Arrays whose second largest dim is smaller keep their whole second moment."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(AdamW):
    """Adam whose step on each layer is as long as its weights, times the learning rate; for batches of
    thousands (You et al. 2020, arXiv 1904.00962). A layer: as in trust_ratio.
    """

    name: ClassVar[str] = "lamb"
    learning_rate: float = 2e-3
    """Peak learning rate: the length of a layer's step over that of its weights."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decay of arrays of two or more dims, within the step whose length is set."""

    def after_decay(self, matrices: Any, dims: Dims) -> list[optax.GradientTransformation]:
        return [trust_ratio(1.0, matrices, dims)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LARS(SGD):
    """Momentum whose step on each layer is as long as its weights, times trust and learning rate; for image
    models in large batches (You et al. 2017, arXiv 1708.03888). A layer: as in trust_ratio.
    """

    name: ClassVar[str] = "lars"
    learning_rate: float = 10.0
    """Peak learning rate; that of biases and norms too, times trust."""
    trust: float = 1e-3
    """The length of a layer's step over that of its weights, before the learning rate."""
    nesterov: bool = False
    """Nesterov's form (Sutskever et al. 2013)."""
    weight_decay: float = 1e-4
    """Decay of arrays of two or more dims, within the step whose length is set."""

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
    """Scales the update of each layer to `trust` times the norm of its weights.

    A layer is an array in `matrices`, each slice along its stacked dims (`layers`, `experts`) by itself, so
    that stacked equals unstacked; a layer of zeros keeps its update. Others (biases, norms) are scaled by
    `trust` alone. On whole logical arrays: the norm of a shard would be wrong.
    """
    import jax.numpy as jnp
    import optax

    from spmd import tree

    def scale(name: str, update: Any, param: Any, matrix: bool) -> Any:
        if not matrix:
            return update * trust
        known = dims.get(name) or (None,) * param.ndim
        axes = tuple(i for i, dim in enumerate(known) if dim not in ("layers", "experts"))
        wide = tree.wide(param.dtype)
        length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(wide)), axis=axes, keepdims=True))
        of_param, of_update = length(param), length(update)
        both = (of_param > 0) & (of_update > 0)
        ratio = jnp.where(both, of_param / jnp.where(both, of_update, 1), 1)
        return (update.astype(wide) * ratio * trust).astype(update.dtype)

    return optax.stateless(
        lambda updates, params=None: tree.map_named(scale, updates, params, matrices)
    )


OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.name: cls for cls in (SGD, AdamW, Lion, Muon, Adafactor, LAMB, LARS)
}


def named(name: str) -> type[Optimizer]:
    """The optimizer class of a name; ValueError with the closest one."""
    check(
        name in OPTIMIZERS,
        f"unknown optimizer {name!r}.{closest(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}",
    )
    return OPTIMIZERS[name]


def decay_mask(params: Any, dims: dict[str, Any]) -> Any:
    """True where weight decay applies: a matrix or more, so no biases, be they of stacked layers or heads."""
    from spmd import tree

    def decays(name: str, x: Any) -> bool:
        known = dims.get(name)
        return bool(matrix_axes(known)[0]) if known else len(x.shape) >= 2

    return tree.map_named(decays, params)
