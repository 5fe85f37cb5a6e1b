"""How an array of a model is stored in a tensor of another library: which dims are which axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Axes = tuple[tuple[int, ...], ...]
ROWS, COLUMNS = ((0,), (1,)), ((1,), (0,))  # a matrix as it is, and transposed
VECTOR: Axes = ((0,),)
STATE = "model_state/"  # arrays that are no parameters, as running statistics


class Part(NamedTuple):
    """An array of a model in a tensor, whose axes are each any number of dims of a layer's array.

    array: its name, without `params/`. unfold: sizes of the dims that the array's first dim is made of, where
    the tensor has them apart; they count as dims then.
    """

    array: str
    axes: Axes
    unfold: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of the array in a state."""
        return self.array if self.array.startswith(STATE) else f"params/{self.array}"

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the tensor, from the shape of a layer's array."""
        sizes = self._dims(shape)
        return tuple(math.prod(sizes[d] for d in dims) for dims in self.axes)

    def block(
        self, tensor: Any, offset: int, shape: Sequence[int], index: Sequence[slice]
    ) -> np.ndarray:
        """The block `index` of a layer's array of this shape; reads no more than the block, or the tensor
        where a dim is made of several.

        tensor: sliceable. offset: where the array begins along the tensor's last axis.
        """
        if self.unfold:
            sizes = self._dims(shape)
            every = [slice(0, size) for size in sizes]
            unfolded = self._replace(unfold=()).block(tensor, offset, sizes, every)
            return unfolded.reshape(tuple(shape))[tuple(index)]
        ranges, inner, order = [], [], []
        for axis, dims in enumerate(self.axes):
            if not dims:
                ranges.append(slice(0, 1))
                continue
            first, width = index[dims[0]], math.prod(shape[d] for d in dims[1:])
            begin = offset if axis == len(self.axes) - 1 else 0
            ranges.append(slice(begin + first.start * width, begin + first.stop * width))
            inner += [slice(None), *(index[d] for d in dims[1:])]
            order += dims
        sizes = [
            index[d].stop - index[d].start if d == dims[0] else shape[d]
            for dims in self.axes
            for d in dims
        ]
        block = tensor[tuple(ranges)].reshape(sizes)[tuple(inner)]
        return block.transpose(np.argsort(order))

    def flat(self, array: np.ndarray) -> np.ndarray:
        """A layer's array as the tensor's part."""
        order = [d for dims in self.axes for d in dims]
        sizes = self._dims(array.shape)
        return array.reshape(sizes).transpose(order).reshape(self.stored_shape(array.shape))

    def _dims(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*self.unfold, *shape[1:]) if self.unfold else tuple(shape)


class Tensor(NamedTuple):
    """A tensor of the files. at: its index in its arrays, (), (layer,) or (layer, expert); parts: arrays side
    by side on its last axis.
    """

    name: str
    at: tuple[int, ...]
    parts: tuple[Part, ...]

    def inner(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part of a layer's array that it holds: all, or an expert."""
        return tuple(shape[max(len(self.at) - 1, 0) :])

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """From those of a layer's arrays."""
        shapes_of_parts = [part.stored_shape(self.inner(shapes[part.array])) for part in self.parts]
        return (*shapes_of_parts[0][:-1], sum(shape[-1] for shape in shapes_of_parts))


def single(name: str, array: str, axes: Axes, unfold: tuple[int, ...] = ()) -> Tensor:
    """A tensor that holds an array."""
    return Tensor(name, (), (Part(array, axes, unfold),))
