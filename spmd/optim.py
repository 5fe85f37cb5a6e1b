"""Optimizer and schedule configs that build optax transformations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spmd.fields import check, closest

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
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak (cosine, wsd)."""
    decay_fraction: float = 0.2
    """The last part of the run over which wsd decays."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for arrays of two or more dims (no biases, no norms)."""
    clip_norm: float = 0.0
    """Clips the global gradient norm to this; 0 is off."""

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "weight_decay",
            "clip_norm",
            "warmup_steps",
            "final_fraction",
        ):
            value = getattr(self, name)
            check(value >= 0, f"optimizer.{name}={value} must not be negative")
        check(
            0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must be in (0, 1]",
        )

    def rate(self, num_steps: int) -> optax.Schedule:
        """Learning rate at each step of a run of `num_steps`."""
        import jax.numpy as jnp
        import optax

        peak, final = self.learning_rate, self.learning_rate * self.final_fraction
        rest = max(num_steps - self.warmup_steps, 1)
        if self.schedule == "constant":
            main = optax.constant_schedule(peak)
        elif self.schedule == "cosine":
            main = optax.cosine_decay_schedule(peak, rest, alpha=self.final_fraction)
        else:
            decay = max(round(rest * self.decay_fraction), 1)
            main = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
        if self.warmup_steps:
            warmup = optax.linear_schedule(0.0, peak, self.warmup_steps)
            main = optax.join_schedules([warmup, main], [self.warmup_steps])
        # A float count: optax would mix an integer one with floats, which strict promotion refuses.
        return lambda count: jnp.asarray(main(jnp.asarray(count, jnp.float32)), jnp.float32)

    def direction(self) -> optax.GradientTransformation:
        """The transformation before learning rate and weight decay; each optimizer's own."""
        raise NotImplementedError

    def build(self, num_steps: int, decay_mask: Any) -> optax.GradientTransformation:
        """optax transformation; decay_mask: tree of bools like the parameters."""
        import optax

        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts.append(self.direction())
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=decay_mask))
        return optax.chain(*parts, optax.scale_by_learning_rate(self.rate(num_steps)))


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
        check(0 <= self.momentum < 1, f"optimizer.momentum={self.momentum} must be in [0, 1)")

    def direction(self) -> optax.GradientTransformation:
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
        for name in ("b1", "b2"):
            check(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name}={getattr(self, name)} must be in [0, 1)",
            )

    def direction(self) -> optax.GradientTransformation:
        import optax

        return optax.scale_by_adam(self.b1, self.b2, self.eps)


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.name: cls for cls in (SGD, AdamW)}


def named(name: str) -> type[Optimizer]:
    """The optimizer class of a name; ValueError with the closest one."""
    check(
        name in OPTIMIZERS,
        f"unknown optimizer {name!r}.{closest(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}",
    )
    return OPTIMIZERS[name]


def decay_mask(params: Any, dims: dict[str, Any]) -> Any:
    """True where weight decay applies: two or more dims, the stacked `layers` dim not counted."""
    from spmd import tree

    def decays(name: str, x: Any) -> bool:
        stacked = 1 if dims.get(name) and dims[name][0] == "layers" else 0
        return len(x.shape) - stacked >= 2

    return tree.map_named(decays, params)
