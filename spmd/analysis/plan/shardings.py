"""The sharding of every array of the state: bytes per device, and arrays that a rule could have sharded."""

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

from spmd.core import fields, tree
from spmd.hardware.targets import Target
from spmd.parallel import mesh, sharding
from spmd.parallel.mesh import AXES
from spmd.strategies import Auto, StrategyConfig
from spmd.train.program import Program

GROUPS = {  # field of the state -> its name in the table
    "params": "parameters",
    "opt_state": "optimizer",
    "ema": "moving average",
    "model_state": "model state",
    "tables": "tables",
}
OTHER = "other"  # step, key, what only a strategy has
LARGE = 2**20  # bytes: smaller arrays may well be replicated
Dims = tuple[str | None, ...]


class Array(NamedTuple):
    """An array of the state. dims: None if the model names none. replicated: the reason why it is replicated
    although a rule could shard it; "" otherwise.
    """

    name: str
    group: str
    dims: Dims | None
    shape: tuple[int, ...]
    dtype: str
    sharding: NamedSharding
    bytes: int
    bytes_per_device: int
    replicated: str

    @property
    def spec(self) -> str:
        """The partition spec: `P(None, 'fsdp')`."""
        return str(self.sharding.spec).replace("PartitionSpec", "P")


@dataclasses.dataclass(frozen=True)
class ShardingReport:
    """The shardings of the state of `experiment` on `target`; print it, or use `arrays`, `totals`,
    `json()`.
    """

    experiment: str
    target: Target
    mesh: str
    strategy: str
    arrays: list[Array]

    @property
    def totals(self) -> dict[str, tuple[int, int]]:
        """Group -> (bytes, bytes per device)."""
        totals: dict[str, tuple[int, int]] = {}
        for array in self.arrays:
            size, per_device = totals.get(array.group, (0, 0))
            totals[array.group] = (size + array.bytes, per_device + array.bytes_per_device)
        return totals

    @property
    def bytes_per_device(self) -> int:
        """Bytes of the state on a device."""
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
                group: {"bytes": size, "bytes_per_device": per_device}
                for group, (size, per_device) in self.totals.items()
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
            if array.replicated:
                reasons[array.replicated].append(array)
            table.add_row(
                escape(array.name),
                "" if array.dims is None else ", ".join(dim or "-" for dim in array.dims),
                escape(str(list(array.shape))),
                array.dtype,
                array.spec,
                tree.human_bytes(array.bytes_per_device),
                f"replicated ({list(reasons).index(array.replicated) + 1})"
                if array.replicated
                else "",
            )
        console.print(table)
        for i, (reason, arrays) in enumerate(reasons.items(), 1):
            size = tree.human_bytes(sum(array.bytes_per_device for array in arrays))
            console.print(f"({i}) {len(arrays)} arrays, {size} per device: {escape(reason)}")
        totals = new_table("total", ">arrays", ">bytes", ">per device")
        counts = collections.Counter(array.group for array in self.arrays)
        for group, sizes in self.totals.items():
            totals.add_row(group, str(counts[group]), *map(tree.human_bytes, sizes))
        console.print(totals)
        console.print(self._sum())
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def _sum(self) -> str:
        size, chip = self.bytes_per_device, self.target.chip
        text = f"state: {tree.human_bytes(size)} per device"
        if chip is None:
            return text
        text += f" of {tree.human_bytes(chip.memory)}"
        return text if size <= chip.memory else f"{text}: it does not fit"


def new_table(*columns: str) -> Table:
    """A table without lines; a column named `>bytes` is aligned to the right."""
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


# ---- build the report


def report(program: Program, target: Target, strategy: StrategyConfig) -> ShardingReport:
    """The shardings of the program's state on its mesh; nothing is computed, and no data are read."""
    state = program.abstract_state()
    shardings = tree.named_leaves(program.strategy.state_shardings)
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
            sharding=shardings[name],
            bytes=tree.num_bytes(leaf),
            bytes_per_device=tree.bytes_per_device(leaf, shardings[name]),
            replicated="",
        )
        arrays.append(array._replace(replicated=_replicated(array, strategy)))
    order = [*GROUPS.values(), OTHER]
    arrays.sort(key=lambda array: order.index(array.group))
    return ShardingReport(
        program.name, target, mesh.describe(program.mesh), _describe(strategy), arrays
    )


def _describe(strategy: StrategyConfig) -> str:
    """`auto zero=1`: the name, and the fields that differ from their defaults."""
    defaults = fields.plain(type(strategy)())
    changed = {k: v for k, v in fields.plain(strategy).items() if v != defaults[k]}
    return " ".join([strategy.name, *(f"{k}={v}" for k, v in changed.items())])


def _dims(dims: Mapping[str, Dims | None], state_params: Any) -> Callable[..., Dims | None]:
    """(name, shape) of a leaf of the state -> the logical dims of the parameter that it belongs to."""
    params = tree.named_leaves(state_params)

    def leaf_dims(name: str, shape: Sequence[int]) -> Dims | None:
        top, *rest = name.split("/")
        if GROUPS.get(top) in (None, "model state"):
            return None
        param = owner("/".join(rest), params)
        param_dims = dims.get(param)
        if param_dims is None or params[param].shape == shape:
            return param_dims
        drop = sharding.missing_dim(name, shape, params[param].shape)
        return None if drop is None else (*param_dims[:drop], *param_dims[drop + 1 :])

    return leaf_dims


def owner(name: str, params: Mapping[str, Any]) -> str:
    """Name of the parameter that a leaf of the optimizer state belongs to, by the end of its name; "" for
    none.
    """
    parts = name.split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((tail for tail in tails if tail in params), "")


def _replicated(array: Array, strategy: StrategyConfig) -> str:
    """The reason why a large array is replicated although a rule could have sharded it; "" otherwise."""
    mesh = array.sharding.mesh
    if (
        array.group in (GROUPS["model_state"], OTHER)  # the rules do not apply to them
        or array.bytes <= LARGE
        or mesh.size == 1
        or not array.sharding.is_fully_replicated
    ):
        return ""

    def rule_spec(sizes: dict[str, int]) -> Any:
        other_mesh = AbstractMesh(tuple(sizes.values()), AXES)
        return sharding.spec_of(array.name, array.shape, array.dims, other_mesh, fsdp=True)

    if any(rule_spec(dict(mesh.shape))):
        return f"strategy {_describe(strategy)} replicates it; the rules of auto shard it"
    ones = dict.fromkeys(AXES, 1)
    divisors = [n for n in range(mesh.size, 1, -1) if mesh.size % n == 0]
    best = next((n for n in divisors if any(rule_spec(ones | {"fsdp": n}))), 0)
    if not best:
        return ""
    fsdp = mesh.shape["fsdp"]
    reason = f"mesh.fsdp={fsdp} divides none of its dims" if fsdp > 1 else "no mesh axis shards it"
    under = "" if isinstance(strategy, Auto) else " and strategy auto"
    return f"{reason}; mesh.fsdp={best}{under} would"
