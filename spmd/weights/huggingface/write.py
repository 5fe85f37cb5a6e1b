"""A model's parameters as a directory that transformers' from_pretrained loads."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from spmd.core import tree
from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.weights.huggingface import config, names
from spmd.weights.huggingface.files import INDEX

SHARD = 2 * 2**30  # bytes of a file; so much of the host's memory is needed


def write(directory: str, model: Any, params: Any, *, shard: int = SHARD) -> list[str]:
    """Writes config.json and safetensors of at most `shard` bytes (or one tensor); returns the file names.

    All or nothing: written beside, then renamed. ValueError when the directory exists, or when the model is
    of no family that is known there.
    """
    family = names.family_of(model)
    path = Path(os.path.abspath(os.path.expanduser(directory)))
    check(not path.exists(), f"--to {directory}: exists already; give a new directory")
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ValueError("run.py export needs: pip install safetensors") from None
    leaves = tree.named_leaves(params)
    shards = _shards(model, family, leaves, shard)
    total = sum(_bytes(t, leaves) for its in shards for t in its)
    part = path.parent / f"{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        where = {}
        for i, its in enumerate(shards, 1):
            several = f"model-{i:05}-of-{len(shards):05}.safetensors"
            file = several if len(shards) > 1 else "model.safetensors"
            content = {t.name: _tensor(t, model, leaves) for t in its}
            save_file(content, part / file, metadata={"format": "pt"})
            where |= dict.fromkeys(content, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (part / INDEX).write_text(json_text(index, indent=1) + "\n")
        dtype = str(leaves["embed/table"].dtype)
        fields = config.config_of(model, family, dtype)
        (part / "config.json").write_text(json_text(fields, indent=1) + "\n")
        part.rename(path)
    except OSError as error:
        raise ValueError(f"--to {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted({*where.values()})


def _shards(model: Any, family: str, leaves: Any, limit: int) -> list[list[names.Tensor]]:
    """Tensors in order, filled into files."""
    found: list[list[names.Tensor]] = [[]]
    size = 0
    for tensor in names.tensors(model, family):
        more = _bytes(tensor, leaves)
        if found[-1] and size + more > limit:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += more
    return found


def _bytes(tensor: names.Tensor, leaves: Any) -> int:
    count = 0
    for part in tensor.parts:
        leaf = leaves[part.array]
        count += leaf.nbytes // math.prod(leaf.shape[: len(tensor.at)])
    return count


def _tensor(tensor: names.Tensor, model: Any, leaves: Any) -> np.ndarray:
    """Gathered on the host, without the rows that tables have here beyond the vocabulary."""
    parts = []
    for part in tensor.parts:
        leaf = leaves[part.array]
        array = np.asarray(leaf[tensor.at])
        if part.array == "embed/table":
            array = array[: model.vocab]
        elif part.array == "head/kernel":
            array = array[:, : model.vocab]
        parts.append(part.flat(array))
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))
