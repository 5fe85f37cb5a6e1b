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
from spmd.weights.huggingface import config, files, layout, names

SHOWN = 10  # tensors that a message names
DTYPES = ("F64", "F32", "F16", "BF16")


class Weights(NamedTuple):
    """A directory of safetensors. tensors: by their stored name; aside: a note on files that are not read."""

    path: Path
    model: Any
    family: str
    tensors: dict[str, files.StoredTensor]
    aside: str

    @property
    def about(self) -> str:
        """Description for messages."""
        count = len({entry.file for entry in self.tensors.values()})
        text = f"{self.path} (Hugging Face, {self.family}, {count} file{'s' * (count > 1)})"
        return f"{text}; {self.aside}" if self.aside else text

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays of the model, in this program."""
        tensors = names.tensors(self.model, self.family)
        return sorted({part.name for tensor in tensors for part in tensor.parts})

    def check(self, wanted: Mapping[str, Any], skipped: Set[str] = frozenset()) -> None:
        """ValueError with the tensors that are missing, unexpected, or of another shape.

        skipped: arrays that are not read, whether or not the files have them.
        """
        shapes = self._layer_shapes(wanted)
        expected = {tensor.name: tensor.shape(shapes) for tensor in self._wanted_tensors(wanted)}
        unwanted = {
            tensor.name
            for tensor in names.tensors(self.model, self.family)
            if all(part.array in skipped for part in tensor.parts)
        }
        diff = []
        for name in sorted({*expected, *self.tensors} - unwanted):
            _, shape, dtype = self.tensors.get(name, ("", None, ""))
            tied = getattr(self.model, "tied", False)
            if name not in expected and tied and name == "lm_head.weight":
                continue  # a copy of the table
            if expected.get(name) != shape or dtype not in DTYPES:
                expected_text = f"{list(expected[name])}" if name in expected else "absent"
                stored_text = "absent" if shape is None else f"{dtype}{list(shape)}"
                diff.append(
                    f"  {name}: {stored_text} in the checkpoint, {expected_text} in the model"
                )
        if diff:
            raise ValueError(another_model(self.path, diff))

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays `wanted`, `params/blocks/mlp/up/kernel`, with its shapes, dtypes and shardings.

        Each process reads the shards of its devices, a tensor at a time; the host's memory holds no more than
        a tensor and the file.
        """
        from safetensors import safe_open

        shapes = self._layer_shapes(wanted)
        by_file: dict[str, list[layout.Tensor]] = {}
        for tensor in self._wanted_tensors(wanted):
            by_file.setdefault(self.tensors[tensor.name].file, []).append(tensor)
        arrays: dict[str, jax.Array] = {}
        for file, tensors in sorted(by_file.items()):
            with safe_open(self.path / file, "np") as reader:
                stored = self._stored_names(reader.keys())
                for tensor in tensors:
                    view, offset = reader.get_slice(stored[tensor.name]), 0
                    for part in tensor.parts:
                        name, shape = part.name, tensor.inner(shapes[part.array])
                        if name in wanted:
                            block = (part, view, offset, shape, tensor.at)
                            arrays[name] = _put(wanted[name], arrays.get(name), *block)
                        offset += part.stored_shape(shape)[-1]
        return arrays

    def _stored_names(self, stored: Any) -> dict[str, str]:
        return {names.full_name(name, self.family): name for name in stored}

    def _wanted_tensors(self, wanted: Mapping[str, Any]) -> list[layout.Tensor]:
        """The tensors of which an array is wanted."""
        return [
            tensor
            for tensor in names.tensors(self.model, self.family)
            if any(part.name in wanted for part in tensor.parts)
        ]

    def _layer_shapes(self, wanted: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's arrays in the files: tables without the padding rows."""
        model, shapes = self.model, {}
        for tensor in self._wanted_tensors(wanted):
            for part in tensor.parts:
                if part.name in wanted:
                    shape = wanted[part.name].shape[bool(tensor.at) :]
                    shapes[part.array] = names.stored_shape(model, part.array, shape)
        for tensor in names.tensors(model, self.family):  # other parts of a wanted tensor
            sizes = {shapes[p.array] for p in tensor.parts if p.array in shapes}
            for part in tensor.parts if len(sizes) == 1 else ():
                shapes.setdefault(part.array, next(iter(sizes)))
        return shapes


def another_model(path: Any, diff: list[str]) -> str:
    """Message about a directory whose arrays are not those of the model; diff: a line for each."""
    more = [f"  ... and {len(diff) - SHOWN} more"] if len(diff) > SHOWN else []
    head = f"init.from: {path} is of another model, or incomplete:"
    end = "make the model alike, or leave arrays out with init.skip ('head/*': a new head for other classes)"
    return "\n".join([head, *diff[:SHOWN], *more, end])


def find(path: Path, model: Any) -> Weights:
    """Looks at the headers of all files; ValueError when one is missing or truncated, when two hold a tensor,
    or when config.json says that the model computes something else.
    """
    file = path / "config.json"
    foreign = files.read_json(file)
    family = names.family_of(model, str(foreign.get("model_type", "")))
    try:
        import safetensors
    except ImportError:
        raise ValueError(f"init.from={path} holds safetensors: pip install safetensors") from None
    del safetensors
    tensors, note = files.read_tensors(path, family, model)
    lines = config.find_differences(model, family, foreign) if file.exists() else []
    check(
        not lines,
        f"init.from: {file} is of another model:\n" + "\n".join(f"  {line}" for line in lines),
    )
    if not file.exists():
        note = f"{note}; " * bool(note) + "no config.json to compare the model with"
    return Weights(path, model, family, tensors, note)


def _put(
    wanted: jax.ShapeDtypeStruct,
    stack: jax.Array | None,
    part: layout.Part,
    view: Any,
    offset: int,
    shape: tuple[int, ...],
    position: tuple[int, ...],
) -> jax.Array:
    """The array with one more layer (or an expert of it); each device's block is read by itself."""
    sharding: Any = wanted.sharding
    shape_of_layer = wanted.shape[len(position) :]
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[len(position) :]))

    def block(index: Any) -> np.ndarray:
        full = [slice(*s.indices(n)[:2]) for s, n in zip(index, shape_of_layer, strict=True)]
        # Padding rows of a table, which the file does not have, are 0.
        stored = [slice(min(s.start, n), min(s.stop, n)) for s, n in zip(full, shape, strict=True)]
        rows = part.block(view, offset, shape, stored).astype(wanted.dtype)
        missing = [(0, s.stop - s.start - n) for s, n in zip(full, rows.shape, strict=True)]
        return np.ascontiguousarray(np.pad(rows, missing) if shape_of_layer != shape else rows)

    read = jax.make_array_from_callback(shape_of_layer, sharding, block)
    if not position:
        return read
    zeros, update = _build_update(wanted.shape, str(wanted.dtype), wanted.sharding)
    # Waits, since a host that runs ahead would hold many layers.
    return jax.block_until_ready(update(zeros() if stack is None else stack, read, position))


@functools.cache
def _build_update(shape: tuple[int, ...], dtype: str, sharding: Any) -> tuple[Any, Any]:
    """(zeros, (array, block, index) -> array): updates in place, without a second copy of a layer."""
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    put = lambda array, block, at: array.at[at].set(block)
    return zeros, jax.jit(put, donate_argnums=0, out_shardings=sharding)
