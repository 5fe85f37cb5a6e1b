"""Rounds of local steps, and the outer optimizer, which takes the replicas' averaged difference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import optax

from spmd.core.fields import check, multiples
from spmd.strategies import base
from spmd.strategies.compress import Compression
from spmd.strategies.config import StrategyConfig
from spmd.strategies.merge import AXIS, INSIDE, Merge, stateless, weighted_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig(StrategyConfig):
    """Base of the strategies that take local steps between two outer ones."""

    merges_over: ClassVar[tuple[str, ...]] = ("replica",)
    period: int = 50
    """Local steps between two outer ones, H; must divide the run's steps."""
    outer: Literal["average", "nesterov", "adam"] = "nesterov"
    """Outer optimizer of the averaged difference: average (local SGD), nesterov (DiLoCo), adam (FedAdam)."""
    outer_learning_rate: float = 0.0
    """Outer learning rate; 0 is the usual one: 1 of average, 0.7 of nesterov, 0.01 of adam."""
    outer_momentum: float = 0.9
    """Decay of the outer momentum; average has none."""
    compress: Compression = Compression()
    """Compression of the differences to the consensus that replicas send in an outer step."""

    def __post_init__(self) -> None:
        check(self.period >= 1, f"strategy.period={self.period} must be at least 1")
        check(
            self.outer_learning_rate >= 0,
            f"strategy.outer_learning_rate={self.outer_learning_rate} must not be negative",
        )
        check(
            0 <= self.outer_momentum < 1,
            f"strategy.outer_momentum={self.outer_momentum} must be in [0, 1)",
        )

    def check_run(self, num_steps: int, num_examples: int) -> None:
        check(
            num_steps % self.period == 0,
            f"the run's {num_steps} steps end between two outer steps: strategy.period={self.period} must"
            f" divide them; use --train.steps {multiples(num_steps, self.period)}",
        )

    def _outer_tx(self) -> Any:
        usual = {"average": 1.0, "nesterov": 0.7, "adam": 0.01}[self.outer]
        return outer_tx(self.outer, self.outer_learning_rate or usual, self.outer_momentum)


class Outer(NamedTuple):
    """How the replicas agree. period: local steps between two outer ones.

    merge: what crosses `replica`. proximal: pull of each local step towards the consensus, of FedProx.
    forget: replicas begin each period with a new optimizer state.
    """

    period: int
    tx: optax.GradientTransformation
    merge: Merge = stateless(weighted_mean)
    proximal: float = 0.0
    forget: bool = False


def outer_tx(
    kind: Literal["average", "nesterov", "adam"], learning_rate: float, momentum: float
) -> optax.GradientTransformation:
    """The outer optimizer.

    Args:
        kind: of Adam, epsilon and the second decay are those of Reddi et al. (tau, beta 2).
        learning_rate: of the outer step.
        momentum: its first moment's decay.
    """
    if kind == "adam":
        adam = optax.scale_by_adam(b1=momentum, b2=0.99, eps=1e-3)
        return optax.chain(adam, optax.scale_by_learning_rate(learning_rate))
    return optax.sgd(learning_rate, momentum if kind == "nesterov" else None, nesterov=True)


def check_fits(parts: base.Parts, num_replicas: int) -> None:
    """ValueError where the replicas do not divide over the mesh, or the batch not over the replicas."""
    over = parts.mesh.shape[AXIS]
    check(
        num_replicas % over == 0,
        f"the {num_replicas} replicas of the strategy do not divide over mesh.replica={over}; mesh.replica"
        f" may be {', '.join(str(n) for n in range(1, num_replicas + 1) if num_replicas % n == 0)}",
    )
    batch_size = jax.tree.leaves(parts.batch)[0].shape[0]
    num_shards = math.prod(parts.mesh.shape[axis] for axis in INSIDE)
    multiple = num_replicas * num_shards * parts.accumulate
    check(
        batch_size % multiple == 0,
        f"data.batch_size={batch_size} does not divide over {num_replicas} replicas of the strategy x"
        f" {num_shards} batch shards inside each x train.accumulate={parts.accumulate}; use"
        f" {multiples(batch_size, multiple)}",
    )
