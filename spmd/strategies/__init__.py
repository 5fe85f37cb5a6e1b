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
    by_device: ClassVar[bool] = False  # each device takes the gradient of its own rows by itself

    def build(self, parts: Parts) -> Strategy:
        """The Strategy on parts.mesh."""
        raise NotImplementedError

    def order(self, source: Any, seed: int, batch_size: int) -> Any:
        """The order in which `source` is read, as loader.train_batches takes it; None is the source's own."""
        return None

    def not_private(self) -> str:
        """Why no privacy can be had with it; "" where its update sees one sum of the examples' gradients, to
        which noise is added, and nothing else of them.
        """
        return f"strategy {self.name} does more with gradients than to sum those of all examples"


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

    def not_private(self) -> str:
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllReduce(StrategyConfig):
    """shard_map: each device takes its gradient, an explicit psum sums them (synchronous SGD)."""

    name: ClassVar[str] = "allreduce"
    by_device: ClassVar[bool] = True

    def build(self, parts: Parts) -> Strategy:
        from spmd.strategies import allreduce

        return allreduce.build(parts)

    def not_private(self) -> str:
        return ""


STRATEGIES: dict[str, type[StrategyConfig]] = {cls.name: cls for cls in (Auto, AllReduce)}


def named(name: str) -> type[Any]:
    """The strategy class of a name; ValueError with the closest one."""
    check(
        name in STRATEGIES,
        f"unknown strategy {name!r}.{closest(name, STRATEGIES)} Known: {', '.join(STRATEGIES)}",
    )
    return STRATEGIES[name]
