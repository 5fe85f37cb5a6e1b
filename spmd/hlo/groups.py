"""Replica groups of a collective, and the mesh axes that they span."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

_LIST = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\(\S+\))? ?\{[^}]*\}"
FORM = rf"{_MESH}|{_IOTA}|{_LIST}|\S+"  # of an instruction's replica_groups


def devices(text: str, num_devices: int) -> np.ndarray | None:
    """Devices [groups, devices of a group] of `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` or
    `mesh['a'=4,'b'=2] {'a'}`; `{}` is all in one. None where groups differ in size.
    """
    if text.startswith("{"):
        lists = [row.split(",") for row in re.findall(r"\{([\d,\s]+)\}", text)]
        if not lists:
            return np.arange(num_devices)[None]
        if len({len(row) for row in lists}) > 1:
            return None
        return np.array([[int(device) for device in row] for row in lists])
    if found := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes = _ints(found[1]), _ints(found[2])
        order = _ints(found[3]) if found[3] else tuple(range(len(sizes)))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
    if re.fullmatch(_MESH, text):
        return _of_mesh(text)
    raise ValueError(f"replica groups in a form that is not known: {text}")


def _of_mesh(text: str) -> np.ndarray:
    """Axes by name; `'a':(2)4` is the part of size 4 of an axis, inside its outermost 2. The mesh's devices
    are in order, or `device_ids=([4,2]T(1,0))`, or a list.
    """
    mesh, order, spans = re.findall(r"mesh\[(.*?)\](?:, device_ids=\((\S+)\))? ?\{(.*)\}", text)[0]
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = [
        (name, int(outer or 1), int(size or sizes[name]))
        for name, outer, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", spans)
    ]
    dims: list[int] = []
    place: dict[tuple[str, int], int] = {}  # (axis, size outside of the part) -> dim
    for name, total in sizes.items():
        cuts = {1, total, *(cut for n, a, b in parts if n == name for cut in (a, a * b))}
        for low, high in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
            place[(name, low)] = len(dims)
            dims.append(high // low)
    inside = [place[(name, outer)] for name, outer, size in parts if size > 1]
    rest = [dim for dim in range(len(dims)) if dim not in inside]
    devices = _ordered(order, math.prod(dims)).reshape(dims).transpose(*rest, *inside)
    return devices.reshape(-1, math.prod(dims[dim] for dim in inside))


def _ordered(order: str, num: int) -> np.ndarray:
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if found is None:
        return np.array(_ints(order)) if order else np.arange(num)
    devices = np.arange(num).reshape(_ints(found[1]))
    return devices.transpose(_ints(found[2])).ravel() if found[2] else devices.ravel()


def spanned(groups: np.ndarray | None, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes that each group spans, and no more; () where groups are no product of axes."""
    if groups is None or groups.max(initial=0) >= math.prod(axes.values()):
        return ()
    places = np.stack(np.unravel_index(groups, tuple(axes.values())), -1)
    varies = (places != places[:, :1]).any((0, 1))
    found = tuple(axis for axis, varying in zip(axes, varies, strict=True) if varying)
    return found if math.prod(axes[axis] for axis in found) == groups.shape[1] else ()


def crossed(pairs: np.ndarray, axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which a permute sends; pairs: [pairs, (source, target)]."""
    if pairs.max(initial=0) >= math.prod(axes.values()):
        return ()
    places = np.unravel_index(pairs, tuple(axes.values()))
    return tuple(a for a, p in zip(axes, places, strict=True) if (p[:, 0] != p[:, 1]).any())


def pairs(text: str) -> np.ndarray:
    """`{{0,1},{1,2}}` -> [pairs, (source, target)]."""
    return np.array([_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", text)]).reshape(-1, 2)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
