"""Batches in an order that is a pure function of (seed, epoch, index): the only state is the step.

Position p of the endless stream is example `permutation(seed, p // n)[p % n]`: epochs follow one another
without a gap, nothing is dropped or repeated, and any step can be read without those before it. A mixture of
sources has its own order, as pure; so may a strategy or privacy, whose order may also leave rows empty.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.batches import Expected
from spmd.data import Source, ragged
from spmd.data.skips import Skips
from spmd.data.transform import BatchTransform, Pipeline


class Order:
    """Stream position -> example index: a shuffle for each epoch, of which the last two are cached.

    more: further numbers that the shuffle depends on.
    """

    def __init__(self, seed: int, num_examples: int, *more: int):
        self._seed, self._n, self._more = seed, num_examples, more
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._epochs:
                for old in [e for e in self._epochs if abs(e - epoch) > 1]:
                    del self._epochs[old]
                bits = np.random.Philox(np.random.SeedSequence([self._seed, epoch, *self._more]))
                self._epochs[epoch] = np.random.Generator(bits).permutation(self._n)
            return self._epochs[epoch]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(positions, self._n)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._epoch(first)[offsets]
        examples = np.empty_like(positions)
        for epoch in range(first, last + 1):
            rows = epochs == epoch
            examples[rows] = self._epoch(epoch)[offsets[rows]]
        return examples


@runtime_checkable
class Ordered(Protocol):
    """A source with an order of its own: a pure function of (seed, stream position)."""

    def order(self, seed: int) -> Any:
        """Stream positions int64 [N] -> example indices, by [...]; asked by several threads."""
        ...


class _Reads:
    """Random access to reads, each a list of dispatches, for grain's threads.

    A read gathers `dispatches` of them: passing a small batch between threads costs more than reading it.
    """

    def __init__(
        self,
        source: Source,
        order: Any,
        batch_size: int,
        rows: np.ndarray,
        start: int,
        stop: int,
        steps: int,
        transform: BatchTransform | None,
        dispatches: int,
        skips: Skips,
        expected: Expected,
    ):
        self._source, self._order, self._batch_size, self._rows = source, order, batch_size, rows
        self._start, self._stop, self._steps = start, stop, steps
        self._transform, self._skips, self._expected = transform, skips, expected
        self._read_steps = steps * dispatches

    def __len__(self) -> int:
        return -(-(self._stop - self._start) // self._read_steps)

    def __getitem__(self, index: int) -> list[dict[str, np.ndarray]]:
        first = self._start + index * self._read_steps
        num = min(self._read_steps, self._stop - first)
        steps_S1 = np.arange(first, first + num, dtype=np.int64)[:, None]
        positions = (steps_S1 * self._batch_size + self._rows).ravel()
        examples = self._order[positions]
        # An empty row needs features of the right shapes: those of example 0, which then weigh nothing.
        read = np.maximum(examples, 0)
        batch, good = self._skips.take(self._source, read)
        batch = self._expected.read(batch, read) | {
            "example_id": examples.astype(np.int32),
            "weight": ((examples >= 0) & good).astype(np.float32),
        }
        if self._transform is not None:
            batch = self._transform(batch, positions)
        self._expected.check_ranges(batch)
        by_step = {name: x.reshape(num, -1, *x.shape[1:]) for name, x in batch.items()}
        if self._steps == 1:
            return [{name: x[i] for name, x in by_step.items()} for i in range(num)]
        cuts = [slice(i, i + self._steps) for i in range(0, num, self._steps)]
        return [{name: x[cut] for name, x in by_step.items()} for cut in cuts]


READ_BYTES = 2**20  # a read gathers dispatches up to here


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    stop: int,
    steps_per_dispatch: int = 1,
    rows: np.ndarray | None = None,
    threads: int = 2,
    buffer: int = 4,
    transform: BatchTransform | None = None,
    order: Any = None,
    skips: Skips | None = None,
    expected: Expected | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Host batches for steps [start, stop): {feature: [b, ...]} plus example_id [b], weight [b].

    rows: which rows of the global batch this process loads (default all; b of them).
    steps_per_dispatch S > 1: leaves are [S, b, ...]; the last may hold fewer steps.
    transform: (batch, stream positions) -> batch; see spmd.data.transform.
    order: stream positions int64 [N] -> example indices, by [...], instead of the source's own; asked by
    several threads, so a pure function of the positions (step * batch_size + row). Index -1 leaves the row
    empty: weight 0, example_id -1.
    skips: bad records that may pass (default: none), each an empty row that keeps its example_id.
    expected: features and ranges that each batch is checked against, in the reader threads; ValueError.
    """
    import grain

    if start >= stop:
        return
    rows = np.arange(batch_size) if rows is None else rows
    skips = skips or Skips()
    example, _ = skips.take(source, np.zeros(1, np.int64))
    sizes = [ragged.num_bytes(x) for x in example.values()]
    if isinstance(transform, Pipeline):  # what it decodes may be larger
        sizes += [math.prod(s) * np.dtype(d).itemsize for s, d in transform.output.values()]
    num_bytes = max(sum(sizes), 1) * len(rows) * steps_per_dispatch
    if order is None:
        order = source.order(seed) if isinstance(source, Ordered) else Order(seed, len(source))
    reads = _Reads(
        source,
        order,
        batch_size,
        rows,
        start,
        stop,
        steps_per_dispatch,
        transform,
        max(READ_BYTES // num_bytes, 1),
        skips,
        expected or Expected("training"),
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
    for read in grain.MapDataset.source(reads).to_iter_dataset(options):
        yield from read


def position(step: int, batch_size: int, num_examples: int) -> dict[str, int]:
    """The iterator's state, for the checkpoint; examples, epoch: on average, where rows are empty."""
    return {"step": step, "examples": step * batch_size, "epoch": step * batch_size // num_examples}


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    skips: Skips | None = None,
    expected: Expected | None = None,
    transform: BatchTransform | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is padded with weight 0. skips, expected: as of
    train_batches. transform: draws by the number of the example.
    """
    skips = skips or Skips("evaluation")
    expected = expected or Expected("evaluation")
    rows = np.arange(batch_size) if rows is None else rows
    for first in range(0, len(source), batch_size):
        index = first + rows
        real = index < len(source)
        index = np.where(real, index, 0)
        batch, good = skips.take(source, index)
        batch = expected.read(batch, index) | {
            "example_id": index.astype(np.int32),
            "weight": (real & good).astype(np.float32),
        }
        if transform is not None:
            batch = transform(batch, index)
        expected.check_ranges(batch)
        yield batch


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, ascending."""
    intervals = {
        (s[0].start or 0, batch_size if s[0].stop is None else s[0].stop)
        for s in sharding.addressable_devices_indices_map((batch_size,)).values()
        if s is not None
    }
    return np.concatenate([np.arange(*interval) for interval in sorted(intervals)])


def put(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int
) -> dict[str, jax.Array]:
    """Rows of this process (as process_rows names them) -> global arrays; dim 0 (or 1, after steps) is the
    batch.
    """
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    dim = len(sharding.spec) - 1
    rows = process_rows(batch_only(sharding), batch_size)

    def assemble(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:dim], batch_size, *x.shape[dim + 1 :])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = int(np.searchsorted(rows, index[dim].start or 0))
            size = len(range(batch_size)[index[dim]])
            return x[(slice(None),) * dim + (slice(first, first + size),)]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: assemble(x) for name, x in batch.items()}


def batch_only(sharding: NamedSharding) -> NamedSharding:
    """The sharding of the batch dim alone: without the leading dim of several steps."""
    return NamedSharding(sharding.mesh, P(sharding.spec[-1]))
