"""Leaf by leaf: what a step gave on one device against what it gave on the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd import tree
from spmd.strategies import base
from spmd.verify.named import Named, aligned

# A leaf far smaller than its siblings may be zero but for rounding (a bias before a norm): its error counts
# against at least this part of their norm.
FLOOR = 1e-4
UPDATE_METRICS = ("grad_norm", "learning_rate", "finite")


class Leaf(NamedTuple):
    """One leaf on both sides. error: norm of the difference over the norm; of the worst copy.

    copies: whether devices that should hold the same values do.
    """

    norm: float
    mesh_norm: float
    error: float
    copies: bool = True


def outputs(state: base.TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a step gives, by name: `metrics/loss`, `grads/...`, `params/...`, `opt_state/...`."""
    named = {k if k.startswith("grads/") else f"metrics/{k}": v for k, v in metrics.items()}
    return named | tree.named_leaves(state)


def host(leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copies on the host; the arrays may be donated afterwards."""
    return {name: np.array(leaf) for name, leaf in leaves.items()}


def leaves(want: Mapping[str, np.ndarray], got: Mapping[str, jax.Array]) -> dict[str, Leaf]:
    """Each leaf of one device's step against the mesh's; what the mesh has not, or in another shape, is the
    strategy's own and left out.
    """
    params = {name.removeprefix("params/") for name in want if name.startswith("params/")}
    norms = {name: _norm(x) for name, x in want.items()}
    groups: dict[str, float] = {}
    for name, norm in norms.items():
        key = _group(name, params)
        groups[key] = math.hypot(groups.get(key, 0.0), norm)
    return {
        name: _leaf(x, got[name], max(norms[name], FLOOR * groups[_group(name, params)]))
        for name, x in want.items()
        if name in got and got[name].shape == x.shape
    }


def _group(name: str, params: set[str]) -> str:
    """The name without the parameter's: `opt_state/0/mu`, `grads`."""
    parts = name.split("/")
    for first in range(1, len(parts)):
        if "/".join(parts[first:]) in params:
            return "/".join(parts[:first])
    return name


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def _leaf(want: np.ndarray, got: jax.Array, scale: float) -> Leaf:
    """Every copy on every device is looked at: a sum that was left out shows as copies that differ."""
    worst: dict[Any, float] = {}
    first: dict[Any, np.ndarray] = {}
    copies = True
    for shard in got.addressable_shards:
        data = np.asarray(shard.data, np.float64)
        key = tuple((s.start, s.stop) for s in shard.index)
        difference = _norm(data - np.asarray(want[shard.index], np.float64))
        worst[key] = max(worst.get(key, 0.0), difference, key=_nan_is_most)
        copies &= bool(np.array_equal(first.setdefault(key, data), data, equal_nan=True))
    error = math.hypot(*worst.values()) if worst else 0.0
    norm = math.hypot(*(_norm(part) for part in first.values()))
    return Leaf(_norm(want), norm, _relative(error, scale), copies)


def _nan_is_most(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _relative(difference: float, scale: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (0.0 if not difference else math.inf)


class Off(NamedTuple):
    """A tensor that differs, in the stage where it is made."""

    stage: str  # forward, gradient or update
    name: str
    leaf: Leaf


def wrong(
    found: Mapping[str, Leaf], activations: Iterable[tuple[str, Leaf]], tolerance: float
) -> list[Off]:
    """What differs, in the order in which a step makes it: activations, loss and statistics, gradients
    backwards, optimizer state, parameters, their average.

    activations: in forward order; a parameter stands where the module that holds it does.
    """
    activations = list(activations)
    forward = {name.split("[")[0]: i for i, (name, _) in enumerate(activations)}

    def depth(leaf: str) -> int:
        """Where in the forward pass the module of a parameter stands; later than all when unknown."""
        parts = leaf.split("/")[1:]
        for end in range(len(parts) - 1, 0, -1):
            if "/".join(parts[:end]) in forward:
                return forward["/".join(parts[:end])]
        return len(forward)

    def order(item: tuple[str, Leaf]) -> tuple[int, int]:
        top, _, rest = item[0].partition("/")
        if top == "metrics" and rest in UPDATE_METRICS:
            return (6, 0)
        ranks = {"metrics": 0, "model_state": 0, "grads": 1, "opt_state": 2, "params": 3, "ema": 4}
        rank = ranks.get(top, 5)
        return (rank, -depth(item[0]) if rank == 1 else depth(item[0]) if top != "metrics" else 0)

    stages = ("forward", "gradient")
    off = [Off("forward", f"activation {n}", x) for n, x in activations if not x.error <= tolerance]
    for name, leaf in sorted(found.items(), key=order):
        if not leaf.error <= tolerance:
            rank = order((name, leaf))[0]
            off.append(Off(stages[rank] if rank < len(stages) else "update", name, leaf))
    return off


def activations(want: list[Named], got: list[Named]) -> list[tuple[str, Leaf]]:
    """Named tensors of both sides in forward order, each iteration of a loop by itself: `block[3]`."""
    by_name: dict[str, list[Named]] = {}
    for tensor in got:
        by_name.setdefault(tensor.name, []).append(tensor)
    rows: list[tuple[tuple[int, ...], str, Leaf]] = []
    for tensor in want:
        others = by_name.get(tensor.name)
        pair = aligned(tensor, others.pop(0)) if others else None
        if pair is None:
            continue
        reference, mesh = pair
        copies = mesh.ndim > reference.ndim
        loops = tensor.lead.count("loop")
        for at in np.ndindex(*reference.shape[:loops]):
            one = np.asarray(reference[at], np.float64)
            each = [np.asarray(m[at], np.float64) for m in (mesh if copies else [mesh])]
            difference = max((_norm(m - one) for m in each), key=_nan_is_most)
            same = all(np.array_equal(m, each[0], equal_nan=True) for m in each)
            iteration = iter(at)
            place = tuple(next(iteration) if i is None else i for i in tensor.place)
            label = tensor.name + (f"[{','.join(map(str, at))}]" if at else "")
            error = _relative(difference, _norm(one))
            rows.append((place, label, Leaf(_norm(one), _norm(each[0]), error, same)))
    return [(label, leaf) for _, label, leaf in sorted(rows, key=lambda row: row[0])]
