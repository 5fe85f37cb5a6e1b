"""The index of a saved step, opened again after the save: are all arrays, chunks and bytes there?

Orbax stores the arrays as Zarr chunks in an OCDBT database: a B-tree from chunk names to ranges of files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from spmd.core import paths
from spmd.core.storage import is_remote
from spmd.train.checkpoint import reading

_ARRAYS = "state"  # Orbax's directory of them in a step
_DESCRIPTION = "_METADATA"  # its description of them


def reopened(path: epath.Path, leaves: Mapping[str, Any]) -> str:
    """Why a step that was just saved is not complete, "" when it is; raises what another try may read.

    Args:
      path: the step.
      leaves: `{name: array or ShapeDtypeStruct}`, what was saved.
    """
    try:
        described = json.loads((path / _ARRAYS / _DESCRIPTION).read_bytes())["tree_metadata"]
        if len(described) != len(leaves):
            return f"Orbax describes {len(described)} arrays instead of {len(leaves)}"
        return lacks(path, leaves)
    except Exception as error:
        if reading.passes(error):
            raise
        return reading.first_line(error)


def lacks(path: epath.Path, leaves: Mapping[str, Any]) -> str:
    """Leaves that the index of a step lacks or holds otherwise, as a message; "" when it is complete.

    Reads the index only, not the arrays: its cost grows with their number and not with their size.

    Args:
      path, leaves: as in reopened.

    Raises:
      Exception: the index cannot be opened; TensorStore has no class for its errors.
    """
    import tensorstore as ts

    with paths.plain(path) as place:
        base = _driver(f"{place}/{_ARRAYS}/")
        store: Any = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        files: Any = ts.KvStore.open(base).result()
        chunks = dict(_entries(files))
        headers = {name: store.read(f"{name}/zarr.json") for name in leaves}
        for name, leaf in leaves.items():
            found = headers[name].result()
            if found.state != "value":
                return f"array {name} is not in its index"
            header = json.loads(found.value)
            there, here = (header["shape"], header["data_type"]), ([*leaf.shape], str(leaf.dtype))
            if there != here:
                return f"array {name} is {there[1]}{there[0]} in its index instead of {here[1]}{here[0]}"
            missing = [chunk for chunk in _chunks(name, header) if chunk not in chunks]
            if missing:
                return f"{len(missing)} chunks of array {name} are not in its index ({missing[0]})"
    return _beyond(path / _ARRAYS, chunks)


def _driver(place: str) -> dict[str, str]:
    """TensorStore's name of a directory."""
    if not is_remote(place):
        return {"driver": "file", "path": place}
    bucket, _, inside = place.partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": inside}


def _chunks(name: str, header: Mapping[str, Any]) -> Iterator[str]:
    """The names of the chunks of an array, by its Zarr header (Zarr 3 core specification, "c/0/1")."""
    sizes = header["chunk_grid"]["configuration"]["chunk_shape"]
    grid = [-(-n // size) for n, size in zip(header["shape"], sizes, strict=True)]
    for flat in range(math.prod(grid)):
        at = []
        for count in reversed(grid):
            flat, i = divmod(flat, count)
            at.append(str(i))
        yield "/".join([name, "c", *reversed(at)])


def _entries(files: Any) -> Iterator[tuple[str, str]]:
    """(chunk or header, "" or the range of a file that it lies in), of the newest version in a database."""
    import tensorstore as ts

    newest = ts.ocdbt.dump(files).result()["versions"][-1]
    below = [(newest["root"]["location"], "")]
    while below:
        location, prefix = below.pop()
        for entry in ts.ocdbt.dump(files, node=location).result()["entries"]:
            if "location" in entry:
                common = entry.get("subtree_common_prefix", b"").decode()
                below.append((entry["location"], prefix + common))
            else:
                yield prefix + entry["key"].decode(), entry.get("indirect_value", "")


def _beyond(path: epath.Path, chunks: Mapping[str, str]) -> str:
    """Which file is shorter than a chunk in it needs; "" when none is.

    A range is `value:PREFIX:NAME:OFFSET:LENGTH`, the file PREFIX + NAME.
    """
    needed: dict[str, int] = {}
    for where in filter(None, chunks.values()):
        _, prefix, name, offset, length = where.split(":")
        file = prefix + name
        needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    for file, size in needed.items():
        there = (path / file).stat().length if (path / file).exists() else 0
        if there < size:
            return f"file {_ARRAYS}/{file} has {there} bytes, its index needs {size}"
    return ""
