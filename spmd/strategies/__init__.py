"""How the devices agree: a strategy in each file, its configuration and what it does."""

from __future__ import annotations

from typing import Any

from spmd.core.fields import check, closest
from spmd.strategies.allreduce import AllReduce
from spmd.strategies.auto import Auto
from spmd.strategies.compress import Compression
from spmd.strategies.config import StrategyConfig
from spmd.strategies.federated import Federated
from spmd.strategies.local import Local
from spmd.strategies.server import Server

__all__ = [
    "STRATEGIES",
    "AllReduce",
    "Auto",
    "Compression",
    "Federated",
    "Local",
    "Server",
    "StrategyConfig",
    "named",
]

STRATEGIES: dict[str, type[StrategyConfig]] = {
    cls.name: cls for cls in (Auto, AllReduce, Server, Local, Federated)
}


def named(name: str) -> type[Any]:
    """The strategy class of a name; ValueError with the closest one."""
    check(
        name in STRATEGIES,
        f"unknown strategy {name!r}.{closest(name, STRATEGIES)} Known: {', '.join(STRATEGIES)}",
    )
    return STRATEGIES[name]
