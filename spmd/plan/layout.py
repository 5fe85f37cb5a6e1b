"""How a step is cut and arranged: what the search varies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from spmd.fields import check
from spmd.mesh import AXES, BATCH_AXES
from spmd.plan.facts import Facts

Sizes = Mapping[str, int]  # mesh axis -> size
REMATS = ("none", "dots", "named", "full")


class Layout(NamedTuple):
    """mesh: sizes of the axes that are not 1. zero: what mesh.fsdp cuts, 3 parameters and optimizer, 1 the
    optimizer only. remat: of REMATS, "" for a model that has no such field. saved: what remat=named keeps.
    slices: over which the devices are spread.
    """

    mesh: Sizes
    zero: int = 3
    sequence_parallel: bool = False
    accumulate: int = 1
    remat: str = "none"
    saved: tuple[str, ...] = ("query", "key", "value", "attended")
    slices: int = 1

    def size(self, *axes: str) -> int:
        """Product of the sizes of `axes`."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def num_devices(self) -> int:
        """All of them."""
        return self.size(*AXES)

    def words(self) -> list[str]:
        """The command line that asks for it."""
        sizes = {"data": 1} | {axis: size for axis, size in self.mesh.items() if size > 1}
        words = [word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))]
        words += ["--strategy.zero", "1"] if self.zero == 1 and self.size("fsdp") > 1 else []
        words += ["--strategy.sequence-parallel"] if self.sequence_parallel else []
        words += ["--train.accumulate", str(self.accumulate)] if self.accumulate > 1 else []
        return [*words, *(["--model.remat", self.remat] if self.remat else [])]

    def json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self._asdict(), "mesh": dict(self.mesh), "saved": list(self.saved)}

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.mesh.items() if size > 1] or ["one device"]
        parts += [f"zero={self.zero}"] if self.size("fsdp") > 1 else []
        parts += ["sequence-parallel"] if self.sequence_parallel else []
        parts += [f"accumulate={self.accumulate}"] if self.accumulate > 1 else []
        return " ".join([*parts, *([f"remat={self.remat}"] if self.remat else [])])


def tokens(facts: Facts, layout: Layout) -> float:
    """Of one microbatch, on one device, before the heads or the vocabulary are cut."""
    return facts.tokens / layout.size(*BATCH_AXES, "context") / layout.accumulate


def check_fits(facts: Facts, layout: Layout) -> None:
    """ValueError with the reason why the experiment cannot be cut so, memory aside."""
    rows = layout.size(*BATCH_AXES) * layout.accumulate
    check(
        facts.batch_size % rows == 0,
        f"data.batch_size={facts.batch_size} does not divide over {layout.size(*BATCH_AXES)} batch shards"
        f" x train.accumulate={layout.accumulate}",
    )
    for axis in ("stage", "context", "expert"):
        check(layout.size(axis) == 1, f"mesh.{axis}={layout.size(axis)} is not estimated yet")
    tensor = layout.size("tensor")
    if facts.model is None:
        check(tensor == 1, f"mesh.tensor={tensor}: what it costs is known of Transformer only")
        return
    check(
        facts.model.heads % tensor == 0 and facts.model.num_kv_heads % tensor == 0,
        f"mesh.tensor={tensor} does not divide the {facts.model.heads} heads and"
        f" {facts.model.num_kv_heads} key and value heads",
    )
    check(
        not layout.sequence_parallel or facts.length % tensor == 0,
        f"sequence parallelism: mesh.tensor={tensor} does not divide the {facts.length} tokens of a sequence",
    )
