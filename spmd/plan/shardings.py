"""How every array of the state lies on a mesh: bytes per device, and what a rule could have cut."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, NamedSharding
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spmd import fields, mesh, sharding, tree
from spmd.mesh import AXES
from spmd.plan.targets import Target
from spmd.strategies import Auto, StrategyConfig
from spmd.train.program import Program

GROUPS = {  # field of the state -> its name in the table
    "params": "parameters",
    "opt_state": "optimizer",
    "ema": "moving average",
    "model_state": "model state",
}
OTHER = "other"  # step, key, what only a strategy has
LARGE = 2**20  # bytes: what is smaller may well be whole
Dims = tuple[str | None, ...]


class Array(NamedTuple):
    """One array of the state. dims: None where the model names none. whole: why it was left whole, though a
    rule could cut it; "" otherwise.
    """

    name: str
    group: str
    dims: Dims | None
    shape: tuple[int, ...]
    dtype: str
    sharding: NamedSharding
    bytes: int
    bytes_per_device: int
    whole: str

    @property
    def spec(self) -> str:
        """`P(None, 'fsdp')`."""
        return str(self.sharding.spec).replace("PartitionSpec", "P")


@dataclasses.dataclass(frozen=True)
class Report:
    """The state of `experiment` on `target`; print it, or take `arrays`, `totals` and `json()`."""

    experiment: str
    target: Target
    mesh: str
    strategy: str
    arrays: list[Array]

    @property
    def totals(self) -> dict[str, tuple[int, int]]:
        """Group -> (bytes, bytes per device)."""
        found: dict[str, tuple[int, int]] = {}
        for array in self.arrays:
            whole, each = found.get(array.group, (0, 0))
            found[array.group] = (whole + array.bytes, each + array.bytes_per_device)
        return found

    @property
    def bytes_per_device(self) -> int:
        """Of the whole state."""
        return sum(array.bytes_per_device for array in self.arrays)

    def json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        chip = self.target.chip
        return {
            "experiment": self.experiment,
            "target": self.target.name,
            "devices": self.target.num_devices,
            "mesh": self.mesh,
            "strategy": self.strategy,
            "memory_per_device": int(chip.memory) if chip else None,
            "bytes_per_device": self.bytes_per_device,
            "groups": {
                group: {"bytes": whole, "bytes_per_device": each}
                for group, (whole, each) in self.totals.items()
            },
            "arrays": [_plain(array) for array in self.arrays],
        }

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=240, highlight=False)
        console.print(
            f"{self.experiment} on {self.target.name}: {self.target.num_devices} devices, mesh"
            f" {self.mesh}, strategy {self.strategy}"
        )
        reasons = collections.defaultdict[str, list[Array]](list)
        table = new_table("array", "logical dims", "shape", "dtype", "spec", ">per device", "")
        for array in self.arrays:
            if array.whole:
                reasons[array.whole].append(array)
            table.add_row(
                escape(array.name),
                "" if array.dims is None else ", ".join(dim or "-" for dim in array.dims),
                escape(str(list(array.shape))),
                array.dtype,
                array.spec,
                tree.human_bytes(array.bytes_per_device),
                f"whole ({list(reasons).index(array.whole) + 1})" if array.whole else "",
            )
        console.print(table)
        for i, (reason, arrays) in enumerate(reasons.items(), 1):
            size = tree.human_bytes(sum(array.bytes_per_device for array in arrays))
            console.print(f"({i}) {len(arrays)} arrays, {size} per device: {escape(reason)}")
        totals = new_table("total", ">arrays", ">bytes", ">per device")
        counts = collections.Counter(array.group for array in self.arrays)
        for group, (whole, each) in self.totals.items():
            sizes = (tree.human_bytes(n) for n in (whole, each))
            totals.add_row(group, str(counts[group]), *sizes)
        console.print(totals)
        console.print(self._sum())
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def _sum(self) -> str:
        each, chip = self.bytes_per_device, self.target.chip
        text = f"state: {tree.human_bytes(each)} per device"
        if chip is None:
            return text
        text += f" of {tree.human_bytes(chip.memory)}"
        return text if each <= chip.memory else f"{text}: it does not fit"


def new_table(*columns: str) -> Table:
    """Without lines; a column named `>bytes` stands right."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def _plain(array: Array) -> dict[str, Any]:
    spec = [list(part) if isinstance(part, tuple) else part for part in array.sharding.spec]
    return {
        **array._asdict(),
        "dims": None if array.dims is None else list(array.dims),
        "shape": list(array.shape),
        "sharding": [*spec, *[None] * (len(array.shape) - len(spec))],
    }


# ---- made


def report(program: Program, target: Target, strategy: StrategyConfig) -> Report:
    """Every array of the program's state on its mesh; nothing is computed, and no data are read."""
    state = program.abstract_state()
    placed = tree.named_leaves(program.strategy.state_shardings)
    dims_of = _dims(program.task.dims, state.params)
    arrays = []
    for name, leaf in tree.named_leaves(state).items():
        dims = dims_of(name, leaf.shape)
        array = Array(
            name=name,
            group=GROUPS.get(name.split("/")[0], OTHER),
            dims=dims,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            sharding=placed[name],
            bytes=tree.num_bytes(leaf),
            bytes_per_device=tree.bytes_per_device(leaf, placed[name]),
            whole="",
        )
        arrays.append(array._replace(whole=_whole(array, strategy)))
    order = [*GROUPS.values(), OTHER]
    arrays.sort(key=lambda array: order.index(array.group))
    cut = mesh.describe(program.mesh)
    return Report(program.name, target, cut, _describe(strategy), arrays)


def _describe(strategy: StrategyConfig) -> str:
    """`auto zero=1`: the name, and what is not as by default."""
    usual = fields.plain(type(strategy)())
    own = {k: v for k, v in fields.plain(strategy).items() if v != usual[k]}
    return " ".join([strategy.name, *(f"{k}={v}" for k, v in own.items())])


def _dims(dims: Mapping[str, Dims | None], of_params: Any) -> Callable[..., Dims | None]:
    """(name, shape) of a leaf of the state -> the logical dims of the parameter that it belongs to."""
    params = tree.named_leaves(of_params)

    def of(name: str, shape: Sequence[int]) -> Dims | None:
        top, *rest = name.split("/")
        if GROUPS.get(top) in (None, "model state"):
            return None
        owned_by = owner("/".join(rest), params)
        found = dims.get(owned_by)
        if found is None or params[owned_by].shape == shape:
            return found
        drop = sharding.reduced_dim(name, shape, params[owned_by].shape)
        return None if drop is None else (*found[:drop], *found[drop + 1 :])

    return of


def owner(name: str, params: Mapping[str, Any]) -> str:
    """The parameter that a leaf of the optimizer state belongs to, by the end of its name; "" for none."""
    parts = name.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if tail in params), "")


def _whole(array: Array, strategy: StrategyConfig) -> str:
    """Why a large array lies whole on every device although a rule could have cut it; "" otherwise."""
    placed, cut = array.sharding, array.sharding.mesh
    if (
        array.group in (GROUPS["model_state"], OTHER)  # no rule is for them
        or array.bytes <= LARGE
        or cut.size == 1
        or not placed.is_fully_replicated
    ):
        return ""

    def by_rule(sizes: dict[str, int]) -> Any:
        made = AbstractMesh(tuple(sizes.values()), AXES)
        return sharding.spec_of(array.name, array.shape, array.dims, made, fsdp=True)

    if any(by_rule(dict(cut.shape))):
        return f"strategy {_describe(strategy)} keeps it whole; the rules of auto cut it"
    alone = dict.fromkeys(AXES, 1)
    ways = [n for n in range(cut.size, 1, -1) if cut.size % n == 0]
    best = next((n for n in ways if any(by_rule(alone | {"fsdp": n}))), 0)
    if not best:
        return ""
    fsdp = cut.shape["fsdp"]
    why = f"mesh.fsdp={fsdp} divides none of its dims" if fsdp > 1 else "no axis cuts it"
    under = "" if isinstance(strategy, Auto) else " and strategy auto"
    return f"{why}; mesh.fsdp={best}{under} would"
