"""Check the index of a saved step, opened again after the save: all arrays, chunks and bytes.

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


def check_complete(path: epath.Path, leaves: Mapping[str, Any]) -> str:
    """Why a step that was just saved is not complete, "" when it is; raises errors that may be transient.

    Args:
      path: the step.
      leaves: `{name: array or ShapeDtypeStruct}` that was saved.
    """
    try:
        metadata = json.loads((path / _ARRAYS / _DESCRIPTION).read_bytes())["tree_metadata"]
        if len(metadata) != len(leaves):
            return f"Orbax describes {len(metadata)} arrays instead of {len(leaves)}"
        return check_arrays(path, leaves)
    except Exception as error:
        if reading.is_transient(error):
            raise
        return reading.first_line(error)


def check_arrays(path: epath.Path, leaves: Mapping[str, Any]) -> str:
    """Leaves that the index of a step lacks or holds otherwise, as a message; "" when it is complete.

    Reads the index only, not the arrays: its cost grows with their number and not with their size.

    Args:
      path, leaves: as in check_complete.

    Raises:
      Exception: the index cannot be opened; TensorStore has no class for its errors.
    """
    import tensorstore as ts

    with paths.plain_path(path) as place:
        base = _kvstore(f"{place}/{_ARRAYS}/")
        store: Any = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        files: Any = ts.KvStore.open(base).result()
        chunks = dict(_index_entries(files))
        headers = {name: store.read(f"{name}/zarr.json") for name in leaves}
        for name, leaf in leaves.items():
            entry = headers[name].result()
            if entry.state != "value":
                return f"array {name} is not in its index"
            header = json.loads(entry.value)
            stored, expected = (
                (header["shape"], header["data_type"]),
                ([*leaf.shape], str(leaf.dtype)),
            )
            if stored != expected:
                return (
                    f"array {name} is {stored[1]}{stored[0]} in its index instead of"
                    f" {expected[1]}{expected[0]}"
                )
            missing = [chunk for chunk in _chunks(name, header) if chunk not in chunks]
            if missing:
                return f"{len(missing)} chunks of array {name} are not in its index ({missing[0]})"
    return _short_file(path / _ARRAYS, chunks)


def _kvstore(place: str) -> dict[str, str]:
    """TensorStore's specification of a directory."""
    if not is_remote(place):
        return {"driver": "file", "path": place}
    bucket, _, inside = place.partition("://")[2].partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": inside}


def _chunks(name: str, header: Mapping[str, Any]) -> Iterator[str]:
    """The names of the chunks of an array, by its Zarr header (Zarr 3 core specification, "c/0/1")."""
    sizes = header["chunk_grid"]["configuration"]["chunk_shape"]
    grid = [-(-n // size) for n, size in zip(header["shape"], sizes, strict=True)]
    for flat in range(math.prod(grid)):
        indices = []
        for count in reversed(grid):
            flat, i = divmod(flat, count)
            indices.append(str(i))
        yield "/".join([name, "c", *reversed(indices)])


def _index_entries(files: Any) -> Iterator[tuple[str, str]]:
    """(chunk or header, "" or its range in a file), of the newest version in a database."""
    import tensorstore as ts

    newest = ts.ocdbt.dump(files).result()["versions"][-1]
    nodes = [(newest["root"]["location"], "")]
    while nodes:
        location, prefix = nodes.pop()
        for entry in ts.ocdbt.dump(files, node=location).result()["entries"]:
            if "location" in entry:
                common = entry.get("subtree_common_prefix", b"").decode()
                nodes.append((entry["location"], prefix + common))
            else:
                yield prefix + entry["key"].decode(), entry.get("indirect_value", "")


def _short_file(path: epath.Path, chunks: Mapping[str, str]) -> str:
    """A message about a file that is too short for a chunk in it; "" when there is none.

    A range is `value:PREFIX:NAME:OFFSET:LENGTH`, the file PREFIX + NAME.
    """
    needed: dict[str, int] = {}
    for value_range in filter(None, chunks.values()):
        _, prefix, name, offset, length = value_range.split(":")
        file = prefix + name
        needed[file] = max(needed.get(file, 0), int(offset) + int(length))
    for file, size in needed.items():
        size_on_disk = (path / file).stat().length if (path / file).exists() else 0
        if size_on_disk < size:
            return f"file {_ARRAYS}/{file} has {size_on_disk} bytes, its index needs {size}"
    return ""
