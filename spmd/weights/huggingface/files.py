"""The safetensors files of a model in a directory: one source for each tensor, or an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from spmd.core.fields import check
from spmd.weights.huggingface import names

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
ADAPTER = "adapter_config.json"
PART = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
UNREAD = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def has_weights(path: Path) -> bool:
    """Whether there are safetensors in a directory."""
    return path.is_dir() and (any(path.glob("*.safetensors")) or (path / INDEX).exists())


def unreadable_files(path: Path) -> list[str]:
    """Files of weights in formats that are not read; PyTorch's are pickles, which execute code."""
    names_found = (
        {p.name for pattern in UNREAD for p in path.glob(pattern)} if path.is_dir() else set()
    )
    return sorted(names_found)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file, {} without the file; ValueError for anything else, and for duplicate keys."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(), object_pairs_hook=_check_unique)
        return {**content}
    except (ValueError, TypeError) as error:
        raise ValueError(f"init.from: {file} is no JSON object: {error}") from None


def read_tensors(path: Path, family: str, model: Any = None) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a directory by full name, from the headers of its files, and a note on unused files.

    `model.safetensors` has precedence over an index and its parts, as in transformers. ValueError when a file
    is missing or truncated, when two files hold a tensor, or when the index names another file for it.
    """
    files, listed, note = _choose_files(path)
    tensors: dict[str, StoredTensor] = {}
    origins: dict[str, str] = {}  # full name -> where, for a message
    for file in files:
        for name, entry in _read_header(path / file):
            full = names.full_name(name, family)
            if names.is_aside(model, family, full):
                continue
            check(
                listed.get(name, file) == file,
                f"init.from: {path / INDEX} says that {name} is in {listed.get(name)}, but {file} holds it:"
                " remove the file that is wrong, or write the index anew",
            )
            check(
                not listed or name in listed,
                f"init.from: {path / file} holds {name}, which {path / INDEX} does not name: remove the"
                " file that is wrong, or write the index anew",
            )
            check(
                full not in origins,
                f"init.from: {path} holds {full} twice: {origins.get(full)} and {name} in {file}; remove one",
            )
            origins[full] = f"{name} in {file}"
            tensors[full] = entry
    missing = sorted(listed.keys() - {s.rpartition(" in ")[0] for s in origins.values()})
    is_aside = lambda name: names.is_aside(model, family, names.full_name(name, family))
    missing = [name for name in missing if not is_aside(name)]
    check(
        not missing,
        f"init.from: {path / INDEX} says that {', '.join(missing[:3])} is in"
        f" {', '.join(sorted({listed[name] for name in missing[:3]}))}, which does not hold it",
    )
    return tensors, note


def _choose_files(path: Path) -> tuple[list[str], dict[str, str], str]:
    """(files to read, the file of each tensor by the index, a note on unused files)."""
    check(
        not (path / ADAPTER).exists(),
        f"init.from: {path} holds an adapter ({ADAPTER}), which is not read: merge it into its model first"
        " (merge_and_unload of peft), or remove it",
    )
    check(
        not (path / "checkpoints").is_dir(),
        f"init.from: {path} holds safetensors and a run's checkpoints: give {path / 'checkpoints'}/STEP, or"
        " move one of them",
    )
    present = sorted(p.name for p in path.glob("*.safetensors"))
    if (path / SINGLE).is_file():
        unused = [*[INDEX] * (path / INDEX).exists(), *(f for f in present if f != SINGLE)]
        return [SINGLE], {}, f"{_shorten_list(unused)} beside it left aside" if unused else ""
    index = read_json(path / INDEX)
    if not index:
        _check_parts(path, present)
        return present, {}, ""
    listed = index.get("weight_map") or {}
    check(
        isinstance(listed, dict) and bool(listed) and all(map(_is_name, listed.values())),
        f"init.from: {path / INDEX} has no weight_map from tensors to files in its directory",
    )
    files = sorted(set(listed.values()))
    for file in files:
        check(
            (path / file).is_file(),
            f"init.from: {path / file}, which the index names, is missing",
        )
    unused = [f for f in present if f not in files]
    return (
        files,
        listed,
        f"{_shorten_list(unused)}, which the index does not name, left aside" if unused else "",
    )


def _check_parts(path: Path, files: list[str]) -> None:
    """ValueError unless the files, without an index, are a single one, or parts 1 to n of a model."""
    parts = [PART.fullmatch(file) for file in files]
    models = {(m[1], m[3]) for m in parts if m}
    if len(files) == 1 and not models:
        return
    check(
        len(models) == 1 and all(parts),
        f"init.from: {path} holds {_shorten_list(files)} and no {INDEX}: which of them is the model? Leave"
        f" one, or name it {SINGLE}",
    )
    (base, count), digits = next(iter(models)), len(files[0].split("-")[-3])
    expected = [f"{base}-{i:0{digits}}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = [file for file in expected if file not in files]
    check(
        not missing, f"init.from: {path} lacks {_shorten_list(missing)} of its {int(count)} parts"
    )


def _read_header(file: Path) -> list[tuple[str, StoredTensor]]:
    from safetensors import safe_open

    try:
        with safe_open(file, "np") as reader:
            views = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (no dict)
            return [
                (name, StoredTensor(file.name, tuple(view.get_shape()), view.get_dtype()))
                for name, view in views.items()
            ]
    except Exception as error:
        raise ValueError(
            f"init.from: {file} is truncated, or no safetensors file: {error}"
        ) from None


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in content if keys.count(key) > 1)
        raise ValueError(f"it has the key {duplicate!r} twice")
    return content


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _shorten_list(files: Iterable[str]) -> str:
    files = list(files)
    return ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
