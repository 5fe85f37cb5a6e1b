"""How the devices agree: strategy configs by name. The implementations import jax when built."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spmd.fields import check, closest, free

if TYPE_CHECKING:
    from spmd.strategies.base import Parts, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Base of the strategy configs."""

    name: ClassVar[str] = ""

    def build(self, parts: Parts) -> Strategy:
        """The Strategy on parts.mesh."""
        raise NotImplementedError

    def order(self, source: Any, seed: int, batch_size: int) -> Any:
        """The order in which `source` is read, as loader.train_batches takes it; None is the source's own."""
        return None

    def check_steps(self, num_steps: int) -> None:
        """ValueError when a run of so many steps would not end where the strategy can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Auto(StrategyConfig):
    """jit over the mesh: rules place the arrays, the compiler inserts the collectives."""

    name: ClassVar[str] = "auto"
    zero: Literal[1, 3] = free(3)
    """What mesh.fsdp cuts: 1 the optimizer state only (ZeRO-1), 3 the parameters too (FSDP)."""
    sequence_parallel: bool = free(False)
    """Cuts norms and residuals over mesh.tensor too, along time: less memory, the same traffic."""

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import auto

        return auto.build(parts, zero=self.zero, sequence_parallel=self.sequence_parallel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduce(StrategyConfig):
    """shard_map: each device takes its gradient, an explicit psum sums them (synchronous SGD)."""

    name: ClassVar[str] = "allreduce"

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import allreduce

        return allreduce.build(parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(StrategyConfig):
    """Base of the strategies that take local steps between two outer ones."""

    period: int = 50
    """Local steps between two outer ones, H; must divide the run's steps."""
    outer: Literal["average", "nesterov", "adam"] = "nesterov"
    """Outer optimizer of the averaged difference: average (local SGD), nesterov (DiLoCo), adam (FedAdam)."""
    outer_learning_rate: float = 0.0
    """Outer learning rate; 0 is the usual one: 1 of average, 0.7 of nesterov, 0.01 of adam."""
    outer_momentum: float = 0.9
    """Decay of the outer momentum; average has none."""

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

    def check_steps(self, num_steps: int) -> None:
        below = num_steps // self.period * self.period
        check(
            num_steps % self.period == 0,
            f"the run's {num_steps} steps end between two outer steps: strategy.period={self.period} must"
            f" divide them; use --train.steps {f'{below} or ' if below else ''}{below + self.period}",
        )

    def _outer_tx(self) -> Any:
        from spmd.strategies import local

        usual = {"average": 1.0, "nesterov": 0.7, "adam": 0.01}[self.outer]
        return local.outer_tx(self.outer, self.outer_learning_rate or usual, self.outer_momentum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local(Rounds):
    """Replicas take `period` steps by themselves, then an outer one together (local SGD, DiLoCo)."""

    name: ClassVar[str] = "local"
    replicas: int = 8
    """Replicas, whatever the mesh; mesh.replica, over which they are spread, must divide them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.replicas >= 1, f"strategy.replicas={self.replicas} must be at least 1")

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import local

        return local.build(parts, self.replicas, local.Outer(self.period, self._outer_tx()))


STRATEGIES: dict[str, type[StrategyConfig]] = {cls.name: cls for cls in (Auto, AllReduce, Local)}


def named(name: str) -> type[Any]:
    """The strategy class of a name; ValueError with the closest one."""
    check(
        name in STRATEGIES,
        f"unknown strategy {name!r}.{closest(name, STRATEGIES)} Known: {', '.join(STRATEGIES)}",
    )
    return STRATEGIES[name]
