"""Optimizers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spmd.core.fields import check, closest
from spmd.optim.layerwise import LAMB, LARS
from spmd.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon

if TYPE_CHECKING:
    from spmd.optim.base import Optimizer


OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.name: cls for cls in (SGD, AdamW, Lion, Muon, Adafactor, LAMB, LARS)
}


def named(name: str) -> type[Optimizer]:
    """The optimizer class of a name; ValueError with the closest one."""
    check(
        name != "optax",
        "Optax takes a function, which a command line cannot give: write optimizer=Optax(build=lambda rate:"
        " ...) in the experiment's file",
    )
    check(
        name in OPTIMIZERS,
        f"unknown optimizer {name!r}.{closest(name, OPTIMIZERS)} Known: {', '.join(OPTIMIZERS)}",
    )
    return OPTIMIZERS[name]
