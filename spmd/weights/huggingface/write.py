"""Write a model's arrays as a directory that transformers' from_pretrained loads."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spmd.core import tree
from spmd.core.fields import check
from spmd.core.storage import json_text
from spmd.weights.huggingface import config, layout, names
from spmd.weights.huggingface.files import INDEX

SHARD = 2 * 2**30  # bytes of a file, and of the host's memory that writing needs


def write(
    directory: str,
    model: Any,
    params: Any,
    state: Any = None,
    *,
    shard: int = SHARD,
    tokens: Mapping[str, Any] = {},
    beside: Mapping[str, bytes] = {},
) -> list[str]:
    """Write config.json and safetensors of at most `shard` bytes (or one tensor); returns the file names.

    The directory is renamed once it is complete. ValueError when it exists, or when the model belongs to no
    family.

    Args:
        directory: new.
        model: the config of the model.
        params: its parameters.
        state: its model state, as running statistics.
        shard: bytes of a file.
        tokens: fields of config.json about special tokens.
        beside: further files, as those of a tokenizer: {name: content}.
    """
    family = names.family_of(model)
    path = Path(os.path.abspath(os.path.expanduser(directory)))
    check(not path.exists(), f"--to {directory}: exists already; give a new directory")
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ValueError("run.py export needs: pip install safetensors") from None
    leaves = tree.named_leaves({"params": params, "model_state": state or {}})
    shards = _shards(model, family, leaves, shard)
    total = sum(_bytes(t, leaves) for tensors in shards for t in tensors)
    part = path.parent / f"{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        file_of = {}
        for i, tensors in enumerate(shards, 1):
            numbered = f"model-{i:05}-of-{len(shards):05}.safetensors"
            file = numbered if len(shards) > 1 else "model.safetensors"
            arrays = {t.name: _tensor(t, model, leaves) for t in tensors}
            save_file(arrays, part / file, metadata={"format": "pt"})
            file_of |= dict.fromkeys(arrays, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            (part / INDEX).write_text(json_text(index, indent=1) + "\n")
        dtype = str(jax.tree.leaves(params)[0].dtype)
        fields = config.build_config(model, family, dtype) | dict(tokens)
        for name, content in beside.items():
            (part / name).write_bytes(content)
        (part / "config.json").write_text(json_text(fields, indent=1) + "\n")
        part.rename(path)
    except OSError as error:
        raise ValueError(f"--to {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [*sorted({*file_of.values()}), *sorted(beside)]


def _shards(model: Any, family: str, leaves: Any, limit: int) -> list[list[layout.Tensor]]:
    """The tensors of each file, in order."""
    shards: list[list[layout.Tensor]] = [[]]
    size = 0
    for tensor in names.tensors(model, family):
        size_of_tensor = _bytes(tensor, leaves)
        if shards[-1] and size + size_of_tensor > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += size_of_tensor
    return shards


def _bytes(tensor: layout.Tensor, leaves: Any) -> int:
    count = 0
    for part in tensor.parts:
        leaf = leaves[part.name]
        count += leaf.nbytes // math.prod(leaf.shape[: len(tensor.at)])
    return count


def _tensor(tensor: layout.Tensor, model: Any, leaves: Any) -> np.ndarray:
    """A tensor gathered on the host, without the padding rows of tables."""
    parts = []
    for part in tensor.parts:
        leaf = leaves[part.name]
        array = np.asarray(leaf[tensor.at])
        stored = names.stored_shape(model, part.array, array.shape)
        array = array[tuple(slice(0, size) for size in stored)]
        parts.append(part.flat(array))
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))
