"""Safetensors of Hugging Face, read file by file onto a mesh."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.fields import check
from spmd.weights.huggingface import config, files, names

SHOWN = 10  # tensors that a message names
DTYPES = ("F64", "F32", "F16", "BF16")


class Weights(NamedTuple):
    """A directory of safetensors. tensors: by their name there; aside: what of the directory is not read."""

    path: Path
    model: Any
    family: str
    tensors: dict[str, files.StoredTensor]
    aside: str

    @property
    def about(self) -> str:
        """Description for messages."""
        count = len({entry.file for entry in self.tensors.values()})
        shown = f"{self.path} (Hugging Face, {self.family}, {count} file{'s' * (count > 1)})"
        return f"{shown}; {self.aside}" if self.aside else shown

    @property
    def arrays(self) -> list[str]:
        """The arrays of the model, by the names that they have here."""
        found = names.tensors(self.model, self.family)
        return sorted({f"params/{part.array}" for tensor in found for part in tensor.parts})

    def check(self, wanted: Mapping[str, Any], skipped: Set[str] = frozenset()) -> None:
        """ValueError with the tensors that are missing, left over, or of another shape.

        skipped: arrays that are not wanted, whatever the files have of them.
        """
        shapes = self._layer_shapes(wanted)
        expected = {tensor.name: tensor.shape(shapes) for tensor in self._used(wanted)}
        apart = {
            tensor.name
            for tensor in names.tensors(self.model, self.family)
            if all(part.array in skipped for part in tensor.parts)
        }
        diff = []
        for name in sorted({*expected, *self.tensors} - apart):
            _, shape, dtype = self.tensors.get(name, ("", None, ""))
            if name not in expected and self.model.tied and name == "lm_head.weight":
                continue  # a copy of the table
            if expected.get(name) != shape or dtype not in DTYPES:
                here = f"{list(expected[name])} here" if name in expected else "(absent) here"
                there = "(absent)" if shape is None else f"{dtype}{list(shape)}"
                diff.append(f"  {name}: {there} there, {here}")
        if diff:
            raise ValueError(another_model(self.path, diff))

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays as `wanted` says, `params/blocks/mlp/up/kernel`. Of a file each process reads what its
        devices hold, a tensor at a time; of the host's memory no more is taken than a tensor and the file.
        """
        from safetensors import safe_open

        shapes = self._layer_shapes(wanted)
        by_file: dict[str, list[names.Tensor]] = {}
        for tensor in self._used(wanted):
            by_file.setdefault(self.tensors[tensor.name].file, []).append(tensor)
        found: dict[str, jax.Array] = {}
        for file, its in sorted(by_file.items()):
            with safe_open(self.path / file, "np") as opened:
                stored = self._as_stored(opened.keys())
                for tensor in its:
                    view, offset = opened.get_slice(stored[tensor.name]), 0
                    for part in tensor.parts:
                        name, shape = f"params/{part.array}", tensor.inner(shapes[part.array])
                        if name in wanted:
                            block = (part, view, offset, shape, tensor.at)
                            found[name] = _put(wanted[name], found.get(name), *block)
                        offset += part.shape_there(shape)[-1]
        return found

    def _as_stored(self, stored: Any) -> dict[str, str]:
        return {files.full_name(name, self.family): name for name in stored}

    def _used(self, wanted: Mapping[str, Any]) -> list[names.Tensor]:
        """The tensors of which an array is wanted."""
        return [
            tensor
            for tensor in names.tensors(self.model, self.family)
            if any(f"params/{part.array}" in wanted for part in tensor.parts)
        ]

    def _layer_shapes(self, wanted: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's arrays as the files have them: tables without the rows added here."""
        model, found = self.model, {}
        for name, leaf in wanted.items():
            array = name.removeprefix("params/")
            shape = leaf.shape[1:] if array.startswith("blocks/") else leaf.shape
            if array == "embed/table":
                shape = (model.vocab, *shape[1:])
            elif array == "head/kernel":
                shape = (shape[0], model.vocab)
            found[array] = tuple(shape)
        for tensor in names.tensors(model, self.family):  # parts beside a wanted one
            sizes = {found[p.array] for p in tensor.parts if p.array in found}
            for part in tensor.parts if len(sizes) == 1 else ():
                found.setdefault(part.array, next(iter(sizes)))
        return found


def another_model(path: Any, diff: list[str]) -> str:
    """Message about a directory whose arrays are not those of the model; diff: a line for each."""
    more = [f"  ... and {len(diff) - SHOWN} more"] if len(diff) > SHOWN else []
    said = f"init.from: {path} is of another model, or incomplete:"
    end = "make the model alike, or leave arrays out with init.skip"
    return "\n".join([said, *diff[:SHOWN], *more, end])


def find(path: Path, model: Any) -> Weights:
    """Looks at the headers of all files; ValueError when one is missing or truncated, when two hold a tensor,
    or when config.json says that the model computes something else.
    """
    family = names.family_of(model)
    try:
        import safetensors
    except ImportError:
        raise ValueError(f"init.from={path} holds safetensors: pip install safetensors") from None
    del safetensors
    found, aside = files.tensors(path, family)
    file = path / "config.json"
    differ = config.differences(model, family, files.read_json(file)) if file.exists() else []
    check(
        not differ,
        f"init.from: {file} is of another model:\n" + "\n".join(f"  {line}" for line in differ),
    )
    if not file.exists():
        aside = f"{aside}; " * bool(aside) + "no config.json to compare the model with"
    return Weights(path, model, family, found, aside)


def _put(
    wanted: jax.ShapeDtypeStruct,
    before: jax.Array | None,
    part: names.Part,
    view: Any,
    offset: int,
    shape: tuple[int, ...],
    at: tuple[int, ...],
) -> jax.Array:
    """The array with one more layer (or an expert of it), each device's block read by itself."""
    placed: Any = wanted.sharding
    whole = wanted.shape[len(at) :]
    if isinstance(placed, NamedSharding):
        placed = NamedSharding(placed.mesh, P(*placed.spec[len(at) :]))

    def block(index: Any) -> np.ndarray:
        full = [slice(*s.indices(n)[:2]) for s, n in zip(index, whole, strict=True)]
        # rows of a table that the file does not have are 0
        have = [slice(min(s.start, n), min(s.stop, n)) for s, n in zip(full, shape, strict=True)]
        found = part.block(view, offset, shape, have).astype(wanted.dtype)
        missing = [(0, s.stop - s.start - n) for s, n in zip(full, found.shape, strict=True)]
        return np.ascontiguousarray(np.pad(found, missing) if whole != shape else found)

    read = jax.make_array_from_callback(whole, placed, block)
    if not at:
        return read
    zeros, update = _stacking(wanted.shape, str(wanted.dtype), wanted.sharding)
    # Waits: else the host would run ahead and hold many layers.
    return jax.block_until_ready(update(zeros() if before is None else before, read, at))


@functools.cache
def _stacking(shape: tuple[int, ...], dtype: str, placed: Any) -> tuple[Any, Any]:
    """(zeros, (array, block, where) -> array): in place, so that no layer lies there twice."""
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placed)
    put = lambda array, block, at: array.at[at].set(block)
    return zeros, jax.jit(put, donate_argnums=0, out_shardings=placed)
