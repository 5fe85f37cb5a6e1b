"""Compare the outputs of a step on the mesh with those on one device, leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd.analysis.verify.named import Named, align
from spmd.core import tree
from spmd.strategies import base

# Errors are relative to the norm of the leaf, but to at least this fraction of the norm of its group: a leaf
# whose exact value is zero (the gradient of a bias before a norm) holds nothing but rounding.
FLOOR = 1e-4
UPDATE_METRICS = ("grad_norm", "learning_rate", "finite")


class ComparedLeaf(NamedTuple):
    """A leaf compared. error: norm of the difference over the norm, of the copy that differs most.

    copies: whether devices that should hold the same values do.
    """

    norm: float
    mesh_norm: float
    error: float
    copies: bool = True


def outputs(state: base.TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a step by name: `metrics/loss`, `grads/...`, `params/...`, `opt_state/...`."""
    grads = {k: v for k, v in metrics.items() if k.startswith(base.WATCHED_GRADIENTS)}
    names = base.weighed_names(metrics)
    named = {f"metrics/{name}": metrics[name] for name in names}
    # By name, not by place: a strategy has metrics of its own.
    weights: dict[str, Any] = {}
    if len(names) == len(metrics[base.WEIGHTS]):
        weights = {f"metrics/weights/{n}": metrics[base.WEIGHTS][i] for i, n in enumerate(names)}
    return grads | named | weights | tree.named_leaves(state)


def host(leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copies on the host; the arrays may be donated afterwards."""
    return {name: np.array(leaf) for name, leaf in leaves.items()}


def leaves(want: Mapping[str, np.ndarray], got: Mapping[str, jax.Array]) -> dict[str, ComparedLeaf]:
    """Compares each leaf of one device's step with the mesh's. Leaves that the mesh lacks, or has in another
    shape, belong to the strategy and are left out.
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
    """The prefix before the parameter's name: `opt_state/0/mu`, `grads`."""
    parts = name.split("/")
    for first in range(1, len(parts)):
        if "/".join(parts[first:]) in params:
            return "/".join(parts[:first])
    return name


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def _leaf(want: np.ndarray, got: jax.Array, scale: float) -> ComparedLeaf:
    """Compares every copy on every device: a missing all-reduce shows as copies that differ."""
    worst: dict[Any, float] = {}
    first: dict[Any, np.ndarray] = {}
    copies = True
    for shard in got.addressable_shards:
        data = np.asarray(shard.data, np.float64)
        key = tuple((s.start, s.stop) for s in shard.index)
        difference = _norm(data - np.asarray(want[shard.index], np.float64))
        worst[key] = max(worst.get(key, 0.0), difference, key=_nan_as_infinity)
        copies &= bool(np.array_equal(first.setdefault(key, data), data, equal_nan=True))
    error = math.hypot(*worst.values()) if worst else 0.0
    norm = math.hypot(*(_norm(part) for part in first.values()))
    return ComparedLeaf(_norm(want), norm, _relative(error, scale), copies)


def _nan_as_infinity(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _relative(difference: float, scale: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (0.0 if not difference else math.inf)


class Difference(NamedTuple):
    """A tensor that differs, and the stage of the step that computes it."""

    stage: str  # forward, gradient or update
    name: str
    leaf: ComparedLeaf


def find_differences(
    compared: Mapping[str, ComparedLeaf],
    activations: Iterable[tuple[str, ComparedLeaf]],
    tolerance: float,
) -> list[Difference]:
    """Tensors that differ, in the order in which a step computes them: activations, loss and statistics,
    gradients from the last layer to the first, optimizer state, parameters, their moving average.

    activations: in forward order; a parameter takes the position of the module that holds it.
    """
    activations = list(activations)
    forward = {name.split("[")[0]: i for i, (name, _) in enumerate(activations)}

    def depth(leaf: str) -> int:
        """Position of a parameter's module in the forward pass; after all others when unknown."""
        parts = leaf.split("/")[1:]
        for end in range(len(parts) - 1, 0, -1):
            if "/".join(parts[:end]) in forward:
                return forward["/".join(parts[:end])]
        return len(forward)

    def order(item: tuple[str, ComparedLeaf]) -> tuple[int, int]:
        top, _, rest = item[0].partition("/")
        if top == "metrics" and rest in UPDATE_METRICS:
            return (6, 0)
        ranks = {"metrics": 0, "model_state": 0, "grads": 1, "opt_state": 2, "params": 3, "ema": 4}
        rank = ranks.get(top, 5)
        return (rank, -depth(item[0]) if rank == 1 else depth(item[0]) if top != "metrics" else 0)

    stages = ("forward", "gradient")
    off = [
        Difference("forward", f"activation {n}", x)
        for n, x in activations
        if not x.error <= tolerance
    ]
    for name, leaf in sorted(compared.items(), key=order):
        if not leaf.error <= tolerance:
            rank = order((name, leaf))[0]
            off.append(Difference(stages[rank] if rank < len(stages) else "update", name, leaf))
    return off


def activations(want: list[Named], got: list[Named]) -> list[tuple[str, ComparedLeaf]]:
    """Compares named tensors in forward order, each iteration of a loop separately: `block[3]`."""
    by_name: dict[str, list[Named]] = {}
    for tensor in got:
        by_name.setdefault(tensor.name, []).append(tensor)
    rows: list[tuple[tuple[int, ...], str, ComparedLeaf]] = []
    for tensor in want:
        others = by_name.get(tensor.name)
        pair = align(tensor, others.pop(0)) if others else None
        if pair is None:
            continue
        reference, mesh = pair
        copies = mesh.ndim > reference.ndim
        loops = tensor.lead.count("loop")
        for index in np.ndindex(*reference.shape[:loops]):
            expected = np.asarray(reference[index], np.float64)
            values = [np.asarray(m[index], np.float64) for m in (mesh if copies else [mesh])]
            difference = max((_norm(value - expected) for value in values), key=_nan_as_infinity)
            same = all(np.array_equal(value, values[0], equal_nan=True) for value in values)
            iteration = iter(index)
            place = tuple(next(iteration) if i is None else i for i in tensor.place)
            label = tensor.name + (f"[{','.join(map(str, index))}]" if index else "")
            norm = _norm(expected)
            leaf = ComparedLeaf(norm, _norm(values[0]), _relative(difference, norm), same)
            rows.append((place, label, leaf))
    return [(label, leaf) for _, label, leaf in sorted(rows, key=lambda row: row[0])]
