"""Replica groups of a collective, and the mesh axes that they span."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

_LIST = r"\{(?:\{[\d,]*\},?)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\(\S+\))? ?\{[^}]*\}"
FORM = rf"{_MESH}|{_IOTA}|{_LIST}|\S+"  # the replica_groups of an instruction


def devices(text: str, num_devices: int) -> np.ndarray | None:
    """Devices [groups, devices of a group] of `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` or
    `mesh['a'=4,'b'=2] {'a'}`; `{}` is a single group. None if groups differ in size.
    """
    if text.startswith("{"):
        lists = [row.split(",") for row in re.findall(r"\{([\d,\s]+)\}", text)]
        if not lists:
            return np.arange(num_devices)[None]
        if len({len(row) for row in lists}) > 1:
            return None
        return np.array([[int(device) for device in row] for row in lists])
    if iota := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, sizes = _ints(iota[1]), _ints(iota[2])
        order = _ints(iota[3]) if iota[3] else tuple(range(len(sizes)))
        return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape)
    if re.fullmatch(_MESH, text):
        return _mesh_groups(text)
    raise ValueError(f"unknown form of replica groups: {text}")


def _mesh_groups(text: str) -> np.ndarray:
    """Groups [groups, devices of a group] by mesh axes; `'a':(2)4` is the part of size 4 of axis a inside its
    outermost 2. The devices of the mesh are in order, or given as `device_ids=([4,2]T(1,0))`, or as a list.
    """
    mesh, order, spans = re.findall(r"mesh\[(.*?)\](?:, device_ids=\((\S+)\))? ?\{(.*)\}", text)[0]
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts = [
        (name, int(outer or 1), int(size or sizes[name]))
        for name, outer, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", spans)
    ]
    dims: list[int] = []
    dim_of: dict[tuple[str, int], int] = {}  # (axis, size outside of the part) -> dim
    for name, total in sizes.items():
        edges = {1, total, *(edge for n, a, b in parts if n == name for edge in (a, a * b))}
        for low, high in zip(sorted(edges), sorted(edges)[1:], strict=False):
            dim_of[(name, low)] = len(dims)
            dims.append(high // low)
    within = [dim_of[(name, outer)] for name, outer, size in parts if size > 1]
    rest = [dim for dim in range(len(dims)) if dim not in within]
    devices = _mesh_devices(order, math.prod(dims)).reshape(dims).transpose(*rest, *within)
    return devices.reshape(-1, math.prod(dims[dim] for dim in within))


def _mesh_devices(order: str, num: int) -> np.ndarray:
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if match is None:
        return np.array(_ints(order)) if order else np.arange(num)
    devices = np.arange(num).reshape(_ints(match[1]))
    return devices.transpose(_ints(match[2])).ravel() if match[2] else devices.ravel()


def spanned_axes(groups: np.ndarray | None, axes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes whose product is each group; () if the groups are no product of axes."""
    if groups is None or groups.max(initial=0) >= math.prod(axes.values()):
        return ()
    places = np.stack(np.unravel_index(groups, tuple(axes.values())), -1)
    varies = (places != places[:, :1]).any((0, 1))
    names = tuple(axis for axis, varying in zip(axes, varies, strict=True) if varying)
    return names if math.prod(axes[axis] for axis in names) == groups.shape[1] else ()


def crossed_axes(pairs: np.ndarray, axes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which a permute sends. pairs: [pairs, (source, target)]."""
    if pairs.max(initial=0) >= math.prod(axes.values()):
        return ()
    places = np.unravel_index(pairs, tuple(axes.values()))
    return tuple(a for a, p in zip(axes, places, strict=True) if (p[:, 0] != p[:, 1]).any())


def pairs(text: str) -> np.ndarray:
    """`{{0,1},{1,2}}` -> [pairs, (source, target)]."""
    return np.array([_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", text)]).reshape(-1, 2)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
