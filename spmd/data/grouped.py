"""An order for sources whose access is dear: groups shuffled, then the rows within a window of them.

Groups are the row groups of Parquet files, or shards: a window holds so many groups that their rows are
shuffled well, and few enough that they fit in memory. Each epoch has another order, a pure function of
(seed, epoch).
"""

# N examples, G groups

from __future__ import annotations

import collections
import threading
from typing import NamedTuple

import numpy as np

_KEPT = 4  # windows whose order is kept: reader threads are in two, at the end of an epoch in three


class _Epoch(NamedTuple):
    """The windows of an epoch: the groups of each, and its first position."""

    group_G: np.ndarray
    first_group_W: np.ndarray  # of each window, and G
    first_W: np.ndarray  # position of each window, and the number of rows


class GroupOrder:
    """Stream position -> example, for examples in groups.

    Args:
      seed: of the shuffles.
      edges: int64 [G + 1], where each group begins, and the number of examples.
      window: examples that are shuffled together, at least; the groups of a window are read together.
    """

    def __init__(self, seed: int, edges: np.ndarray, window: int):
        self._seed, self._edges, self._window = seed, np.asarray(edges, np.int64), max(window, 1)
        self._epochs: collections.OrderedDict[int, _Epoch] = collections.OrderedDict()
        self._windows: collections.OrderedDict[tuple[int, int], np.ndarray] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *numbers])))

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            sizes_G = np.diff(self._edges)
            group_G = self._generator(epoch).permutation(len(sizes_G))
            first_G = np.cumsum(sizes_G[group_G]) - sizes_G[group_G]
            # A group belongs to the window in which it begins.
            _, first_group_W = np.unique(first_G // self._window, return_index=True)
            first_W = np.append(first_G[first_group_W], self._edges[-1])
            self._epochs[epoch] = _Epoch(group_G, np.append(first_group_W, len(group_G)), first_W)
            while len(self._epochs) > 3:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _rows(self, epoch: int, window: int) -> np.ndarray:
        """The examples of a window, in their order."""
        key = (epoch, window)
        if key not in self._windows:
            about = self._epoch(epoch)
            groups = about.group_G[about.first_group_W[window] : about.first_group_W[window + 1]]
            rows = np.concatenate(
                [np.arange(int(self._edges[g]), int(self._edges[g + 1])) for g in groups]
            )
            self._windows[key] = self._generator(epoch, window, 1).permutation(rows)
            while len(self._windows) > _KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Examples int64 [N] at stream positions int64 [N]."""
        epoch_N, offset_N = np.divmod(positions, self._edges[-1])
        examples_N = np.empty(len(positions), np.int64)
        with self._lock:
            for epoch in np.unique(epoch_N):
                first_W = self._epoch(int(epoch)).first_W
                window_N = np.searchsorted(first_W, offset_N, side="right") - 1
                for window in np.unique(window_N[epoch_N == epoch]):
                    rows = np.flatnonzero((epoch_N == epoch) & (window_N == window))
                    shuffled = self._rows(int(epoch), int(window))
                    examples_N[rows] = shuffled[offset_N[rows] - first_W[window]]
        return examples_N


class Held:
    """Rows of a storage, all or those of a split: every k-th row is evaluated on.

    storage: rows by their number, with `edges` where groups begin. every: k; 0 is all rows. held: whether
    these are the rows that are evaluated on.
    """

    def __init__(self, storage: object, every: int = 0, *, held: bool = False):
        self.storage, self._every, self._held = storage, every, held

    def count(self, rows: np.ndarray) -> np.ndarray:
        """How many of the first `rows` rows of the storage are in the split."""
        if not self._every:
            return rows
        return rows // self._every if self._held else rows - rows // self._every

    def locate(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the storage of examples of the split."""
        if not self._every:
            return indices
        if self._held:
            return indices * self._every + self._every - 1
        return indices + indices // (self._every - 1)
