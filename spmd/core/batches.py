"""Checks of batches: shapes while a program is traced, features and index ranges as they are read."""

# N examples as read, B batch, T time, C classes, V vocab

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import explain
from spmd.core.fields import check, closest


class Ids(NamedTuple):
    """The range of a feature that holds indices: 0 to high - 1, and low to -1 where low is negative.

    high: number of things that are indexed. things: what they are, for messages.
    low: -1 where -1 means "unlabelled".
    target: read by the loss only; a prediction ignores it.
    """

    high: int
    things: str
    low: int = 0
    target: bool = False


Ranges = Mapping[str, Ids]


def feature(batch: Mapping[str, Any], name: str) -> Any:
    """A feature of a batch; ValueError that names those there are."""
    check(
        name in batch,
        f"the batch has no feature {name!r}.{closest(name, batch)} It has: {', '.join(batch)}",
    )
    return batch[name]


def describe_array(x: Any) -> str:
    """dtype and shape as `int32[16, 8, 8]`."""
    return f"{x.dtype}{list(x.shape)}"


def check_indices(batch: Mapping[str, Any], name: str, dims: str, meaning: str) -> None:
    """ValueError unless a feature holds integers of these dims.

    Args:
      batch: arrays, or their shapes; `weight` [B], where there is one, gives the number of rows.
      dims: the dims that the task takes, a letter each: "B" or "BT".
      meaning: of an index, for the message.
    """
    x = feature(batch, name)
    if "weight" in batch:  # a prediction needs none
        check_weight(batch)
    rows = batch["weight"].shape[0] if "weight" in batch else (*x.shape, 0)[0]
    if len(x.shape) == len(dims) and x.shape[0] == rows and jnp.issubdtype(x.dtype, jnp.integer):
        return
    takes = f"int[{', '.join(dims)}]"
    raise ValueError(
        f"feature {name!r} is {describe_array(x)} and the task takes {takes}, {meaning}"
        + (f" (B = {rows} rows, as the weights have)" if "weight" in batch else "")
    )


def check_weight(batch: Mapping[str, Any]) -> None:
    """ValueError unless there is one weight for each row."""
    weight = feature(batch, "weight")
    check(
        len(weight.shape) == 1 and jnp.issubdtype(weight.dtype, jnp.floating),
        f"the weights are {describe_array(weight)} and the task takes float[B], one for each example",
    )


def check_logits(logits: Any, target: Any, name: str, last: str) -> None:
    """ValueError unless logits have the dims of the targets, and one more.

    Args:
      logits, target: arrays, or their shapes.
      name: the feature of the targets.
      last: the name of the last dim.
    """
    ok = tuple(logits.shape[:-1]) == tuple(target.shape) and len(logits.shape) > 0
    shape = ", ".join(map(str, (*target.shape, last)))
    check(
        ok and jnp.issubdtype(logits.dtype, jnp.floating),
        f"the model's output is {describe_array(logits)}, and feature {name!r} is"
        f" {describe_array(target)}: the task takes logits float[{shape}]",
    )


def wide_indices(x: Any) -> Any:
    """Indices in a type wide enough for any number of logits: 8 and 16 bits become int32."""
    return x.astype(np.int32) if x.dtype.itemsize < 4 else x


def index_ranges(task: Any, variables: tuple[Any, Any], batch: Mapping[str, Any]) -> Ranges:
    """The ranges of a task's index features; traces a prediction, compiles nothing.

    Args:
      task: spmd.tasks.Objective.
      variables: shapes of (params, model_state).
      batch: shapes of the global batch.

    Raises:
      ValueError: the model or the task does not take these shapes.
    """
    with_rows = task.with_rows(batch)
    try:
        logits = jax.eval_shape(task.predict, *variables, with_rows)
    except (TypeError, ValueError) as error:
        if explain.from_package(error):
            raise
        features = ", ".join(
            f"{k} {describe_array(x)}" for k, x in batch.items() if k not in _LOADERS
        )
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the model does not take the batch ({features}): {reason}") from error
    return task.ranges(batch, logits)


def _holds_bytes(x: Any, num: int) -> bool:
    """Whether a feature is N values of bytes: a list, or an object array."""
    lists = isinstance(x, list) or (isinstance(x, np.ndarray) and x.dtype.hasobject)
    return lists and len(x) == num and all(isinstance(value, bytes) for value in x)


_LOADERS = ("example_id", "weight")  # features that the loader adds


class Expected(NamedTuple):
    """Requirements on the batches of a split, checked on the host by each process for its own rows.

    split: `training`, `evaluation`, for messages. features: {name: (shape, dtype)} as declared; none: any.
    """

    split: str
    features: Mapping[str, tuple[tuple[int, ...], str]] = MappingProxyType({})
    ranges: Ranges = MappingProxyType({})

    def read(self, batch: dict[str, Any], example_N: np.ndarray) -> dict[str, Any]:
        """The declared features of a source's batch of the examples `example_N`.

        Raises:
          ValueError: a feature is missing, or of another shape or type than declared.
        """
        if not self.features:
            return batch
        num = len(example_N)
        for name, (shape, dtype) in self.features.items():
            if dtype == "bytes" and name in batch and _holds_bytes(batch[name], num):
                continue
            x = np.asarray(batch[name]) if name in batch else None
            if x is None or x.shape != (num, *shape) or x.dtype != dtype:
                self._refuse_feature(name, batch, num)
        return {name: batch[name] for name in self.features}

    def _refuse_feature(self, name: str, batch: Mapping[str, Any], num: int) -> None:
        check(
            name in batch,
            f"the {self.split} data has no feature {name!r}.{closest(name, batch)} It has:"
            f" {', '.join(batch)}",
        )
        x, (shape, dtype) = np.asarray(batch[name]), self.features[name]
        wrong_count = x.shape[:1] != (num,)
        actual = (
            f"{describe_array(x)} for {num} examples"
            if wrong_count
            else f"{x.dtype}{list(x.shape[1:])}"
        )
        raise ValueError(
            f"feature {name!r} of the {self.split} data is {actual}, the experiment declares"
            f" {dtype}{list(shape)}"
        )

    def check_ranges(self, batch: Mapping[str, Any]) -> None:
        """ValueError with feature, value, example and range for the first index that is out of its range.

        batch: features [N, ...] and example_id [N].
        """
        for name, ids in self.ranges.items():
            x = batch.get(name)
            if x is None or not x.size:
                continue
            if int(x.min()) < ids.low or int(x.max()) >= ids.high:
                self._refuse(name, ids, x, batch["example_id"])

    def _refuse(self, name: str, ids: Ids, x: np.ndarray, example_N: np.ndarray) -> None:
        outside = ((x < ids.low) | (x >= ids.high)).reshape(len(x), -1)
        row, column = (int(i) for i in np.argwhere(outside)[0])
        value = int(x.reshape(len(x), -1)[row, column])
        place = f", element {column}" if math.prod(x.shape[1:]) > 1 else ""
        minus = ", or -1 for none" if ids.low < 0 else ""
        advice = ""
        if value < 0 and ids.low == 0:
            advice = "; no value means 'unlabelled' here, so leave such examples out"
        elif value < 0:
            advice = "; only -1 means no target"
        raise ValueError(
            f"feature {name!r} is {value} in example {int(example_N[row])} of the {self.split} data"
            f"{place}: it must be in 0..{ids.high - 1} ({ids.high} {ids.things}){minus}{advice}"
        )
