"""The fields that every optimizer has: schedule, clipping, decay, average."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import tyro

from spmd.core.fields import check
from spmd.optim.rowwise import RowWise

if TYPE_CHECKING:
    import optax


# Logical dims by parameter name, None where a parameter has none (tasks.Objective.dims).
Dims = Mapping[str, tuple[str | None, ...] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Fields of every optimizer: a learning-rate schedule, clipping, decoupled weight decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd", "step"] = "cosine"
    """After the warm-up: constant, cosine to the end, warm-up-stable-decay (linear), or steps down."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0; with base-batch-size, from the rate of that."""
    base_batch_size: int = 0
    """Batch size that learning-rate is for: the rate is scaled with the batch size (Goyal et al. 2017); 0
    is off."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak (cosine, wsd)."""
    decay_fraction: float = 0.2
    """Fraction of the run, at its end, over which wsd decays."""
    drops: tuple[float, ...] = ()
    """Fractions of the run, from its start, after which schedule=step divides the rate by ten."""
    weight_decay: float = 0.0
    """Decoupled weight decay, for arrays of two or more dims (no biases, no norms)."""
    clip_norm: float = 0.0
    """Clips the global gradient norm to this; 0 is off."""
    ema: float = 0.0
    """Decay of the moving average of the parameters that is evaluated; 0 is off."""
    rows: RowWise = RowWise()
    """Optimizer of the rows of sparse tables."""
    groups: tyro.conf.Suppress[tuple[Group, ...]] = ()
    """Parameters with another rate, decay or optimizer, or that are frozen; none of two groups."""

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
        check(
            all(0 < drop < 1 for drop in self.drops) and [*self.drops] == sorted({*self.drops}),
            f"optimizer.drops={self.drops} must ascend, each in (0, 1)",
        )
        check(
            bool(self.drops) == (self.schedule == "step"),
            f"optimizer.schedule={self.schedule} with optimizer.drops={self.drops}: step has drops,"
            " and no other schedule: give both, or neither",
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

        from spmd.optim import knobs

        check(
            self.warmup_steps <= num_steps,
            f"optimizer.warmup_steps={self.warmup_steps} is more than the {num_steps} steps of the run"
            " (train.steps or train.epochs): warm up for less, or train for longer",
        )
        remaining = max(num_steps - self.warmup_steps, 1)
        decay = max(round(remaining * self.decay_fraction), 1)
        rates, name_of = self._rates(batch_size), knobs.namer()

        def at(count: Any) -> Any:
            values = {name: knobs.value(name_of(name), rate) for name, rate in rates.items()}
            peak = values["peak"]
            if self.schedule == "constant":
                main = optax.constant_schedule(peak)
            elif self.schedule == "cosine":
                main = optax.cosine_decay_schedule(peak, remaining, alpha=self.final_fraction)
            elif self.schedule == "step":
                places = [round(num_steps * drop) - self.warmup_steps for drop in self.drops]
                main = stairs(peak, places)
            else:
                fall, final = values.get("fall", peak), values.get("final", 0.0)
                main = linear(fall, final, decay, begin=remaining - decay)
            if self.warmup_steps:
                warmup = linear(-values.get("rise", peak), peak, self.warmup_steps)
                main = optax.join_schedules([warmup, main], [self.warmup_steps])
            # A float count: optax would mix an integer one with floats, which strict promotion refuses.
            # float64 where that is on: the last bit of a float32 cosine depends on the program around it.
            return jnp.asarray(main(jnp.asarray(count, float)), float)

        return at

    def _peak(self, batch_size: int) -> float:
        """The peak learning rate for a batch size."""
        scaled = self.base_batch_size and batch_size
        return self.learning_rate * (batch_size / self.base_batch_size if scaled else 1)

    def _rates(self, batch_size: int) -> dict[str, float]:
        """The learning rates of the schedule: its peak, and where they are no multiple of the peak by a power
        of two the final rate, the fall to it, and the rise of the warm-up.

        Differences are taken here, in float64: those of two rounded arguments would have other last bits.
        """
        rates = {"peak": self._peak(batch_size)}
        if self.schedule == "wsd" and self.final_fraction:
            final = rates["peak"] * self.final_fraction
            rates |= {"final": final, "fall": rates["peak"] - final}
        if self.warmup_steps and self.base_batch_size and batch_size:
            rates["rise"] = rates["peak"] - min(self.learning_rate, rates["peak"])
        return rates

    def knobs(self, batch_size: int = 0) -> dict[str, float]:
        """Scalars that are arguments of the step, by name: learning rates and weight decays, those of groups
        included. A zero is none: it leaves parts of the step out.
        """
        from spmd.optim import groups

        values = self._rates(batch_size) | {"decay": self.weight_decay}
        values |= groups.knobs(self, batch_size)
        return {name: float(value) for name, value in values.items() if value}

    def without_knobs(self) -> Optimizer:
        """This configuration with the same value for each knob of all runs that may share a step."""
        from spmd.optim import groups

        same = lambda value: 1.0 if value else 0.0
        return dataclasses.replace(
            self,
            learning_rate=same(self.learning_rate),
            weight_decay=same(self.weight_decay),
            groups=groups.without_knobs(self.groups),
        )

    def direction(self, matrices: Any, dims: Dims) -> optax.GradientTransformation:
        """The transformation before weight decay and learning rate, which each optimizer defines.

        matrices, dims: decay_mask and dims as `transformation` takes them.
        """
        raise NotImplementedError

    def after_decay(self, matrices: Any, dims: Dims) -> list[optax.GradientTransformation]:
        """The transformation between weight decay and learning rate; arguments as those of `direction`."""
        return []

    def rule(
        self, rate: optax.Schedule, decay: float, matrices: Any, dims: Dims
    ) -> list[optax.GradientTransformation]:
        """The transformations, in their order, that turn gradients into updates.

        Args:
            rate: learning rate at each step.
            decay: weight decay.
            matrices, dims: decay_mask and dims as `transformation` takes them.
        """
        import optax

        from spmd.optim import knobs

        parts = [self.direction(matrices, dims)]
        if decay:
            name = knobs.namer()("decay")
            parts.append(optax.masked(knobs.decayed_weights(decay, name), matrices))
        return [
            *parts,
            *self.after_decay(matrices, dims),
            optax.scale_by_learning_rate(rate),
        ]

    def transformation(
        self, num_steps: int, decay_mask: Any, dims: Dims | None = None, batch_size: int = 0
    ) -> optax.GradientTransformation:
        """The optax transformation.

        Args:
            num_steps: steps of the run.
            decay_mask: tree of bools, structured as the parameters.
            dims: logical dims by parameter name (Task.dims), for optimizers that recognise hidden layers.
            batch_size: examples of a step, as `rate` takes it.
        """
        import optax

        from spmd.core import narrow
        from spmd.optim import groups

        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        if self.groups:
            parts.append(groups.partition(self, num_steps, decay_mask, dims or {}, batch_size))
        else:
            rate = self.rate(num_steps, batch_size)
            parts += self.rule(rate, self.weight_decay, decay_mask, dims or {})
        return narrow.in_float32(optax.chain(*parts))


def linear(span: Any, final: Any, steps: int, begin: int = 0) -> optax.Schedule:
    """A linear schedule as that of optax, which takes the first rate in place of the span.

    Args:
        span: first rate - final rate.
        final: final rate.
        steps: length of the change.
        begin: steps before it.
    """
    import jax.numpy as jnp

    return lambda count: span * (1 - jnp.clip(count - begin, 0, steps) / steps) + final


def stairs(first: Any, places: Sequence[int]) -> optax.Schedule:
    """A schedule that is `first`, and a tenth of what it was from each of `places` on.

    Args:
        first: rate of step 0.
        places: steps.
    """
    import jax.numpy as jnp

    def rate(count: Any) -> Any:
        return first * 0.1 ** sum(jnp.where(count >= place, 1.0, 0.0) for place in places)

    return rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Settings of the parameters whose names match a pattern, in place of the optimizer's."""

    match: str
    """Pattern as in a shell, on names like `layers/1/kernel`; `*` matches `/` too. Sparse tables are
    `tables/NAME`, of which a group has a rate or is frozen."""
    rate: float = 1.0
    """Factor of the learning rate."""
    decay: float | None = None
    """Weight decay in place of the optimizer's, for arrays of two or more dims; None keeps it."""
    optimizer: Optimizer | None = None
    """Another optimizer, with its own schedule and decay; None is the optimizer of the groups."""
    freeze: bool = False
    """Does not train the parameters, as init.freeze: no gradient, no optimizer state, no decay."""

    def __post_init__(self) -> None:
        check(bool(self.match), "optimizer.groups: match='' must be a pattern, as '*/bias'")
        where = f"optimizer.groups: the group {self.match!r}"
        check(self.rate >= 0, f"{where} has rate={self.rate}, which must not be negative")
        check(
            self.decay is None or self.decay >= 0,
            f"{where} has decay={self.decay}, which must not be negative",
        )
        changes = self.rate != 1 or self.decay is not None or self.optimizer is not None
        check(
            not (self.freeze and changes),
            f"{where} freezes its parameters, so rate, decay and optimizer have no effect: leave them out",
        )
        for name in ("clip_norm", "ema", "groups") if self.optimizer else ():
            check(
                not getattr(self.optimizer, name),
                f"{where} has an optimizer with {name}, which is of all parameters: set optimizer.{name}",
            )
