"""Splits of a log: by a ratio within each user, or the last events of each; and lists of items by user."""

# E events, U users, N users as asked for, L items of a list

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from spmd.data.transform import uniform

Part = Literal["train", "validation", "test", "all"]
TRAIN, VALIDATION, TEST = range(3)
_DRAW = 2**40  # of the order in which events are split; transforms draw at other numbers


def ranks(user_E: np.ndarray, key_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each event among those of its user by key, their number), each [E]; ties by number."""
    order = np.lexsort((np.arange(len(user_E)), key_E, user_E))
    counts = np.bincount(user_E)
    starts = np.cumsum(counts) - counts
    rank_E = np.empty(len(user_E), np.int64)
    rank_E[order] = np.arange(len(user_E)) - starts[user_E[order]]
    return rank_E, counts[user_E]


def by_ratio(user_E: np.ndarray, ratios: Sequence[float], seed: int) -> np.ndarray:
    """The part of each event, int8 [E]: events of a user in random order, cut by the ratios.

    As RecBole's ratio split: validation and test are rounded down, but have one event where the ratio gives
    less than one and training keeps one.
    """
    rank_E, num_E = ranks(user_E, uniform(seed, _DRAW, np.arange(len(user_E))))
    share = [ratio / sum(ratios) for ratio in ratios]
    # 0.1 of 10 is 1, although 10 * 0.1 / 1.0 may be a little less.
    size = [np.floor(s * num_E + 1e-9).astype(np.int64) for s in share]
    train_E = num_E - size[1] - size[2]
    for i, part in ((2, TEST), (1, VALIDATION)):
        short_E = (share[i] * num_E > 0) & (share[i] * num_E < 1 - 1e-9) & (train_E > 1)
        size[part] = size[part] + short_E
        train_E = train_E - short_E
    parts_E = np.where(rank_E < train_E, TRAIN, VALIDATION)
    return np.where(rank_E >= num_E - size[2], TEST, parts_E).astype(np.int8)


def by_time(user_E: np.ndarray, time_E: np.ndarray) -> np.ndarray:
    """The part of each event, int8 [E]: the last one of a user is its test, the one before its validation.

    Users of fewer than three events train only.
    """
    rank_E, num_E = ranks(user_E, time_E)
    from_end_E = np.where(num_E < 3, 3, num_E - rank_E)
    return np.choose(np.minimum(from_end_E, 3) - 1, (TEST, VALIDATION, TRAIN)).astype(np.int8)


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """Items of each user: those of user u are items[starts[u] : starts[u + 1]]."""

    starts: np.ndarray
    items: np.ndarray

    @classmethod
    def build(cls, user_E: np.ndarray, item_E: np.ndarray, key_E: np.ndarray, users: int) -> Lists:
        """Lists of the events of `users` users, each ordered by key."""
        order = np.lexsort((np.arange(len(user_E)), key_E, user_E))
        counts = np.bincount(user_E, minlength=users)
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(starts, item_E[order].astype(np.int32))

    @property
    def lengths(self) -> np.ndarray:
        """Number of items of each user [U]."""
        return np.diff(self.starts)

    def __getitem__(self, user: int | np.integer) -> np.ndarray:
        return self.items[self.starts[user] : self.starts[user + 1]]

    def last(
        self, users_N: np.ndarray, length: int, ends_N: np.ndarray | None = None
    ) -> np.ndarray:
        """The last items of users, int32 [N, length], -1 before the first.

        Args:
            users_N: numbers of users.
            length: L.
            ends_N: how many items of each list count; by default all.
        """
        ends_N = self.lengths[users_N] if ends_N is None else ends_N
        back_NL = ends_N[:, None] - np.arange(length, 0, -1)[None]
        at_NL = self.starts[users_N][:, None] + np.maximum(back_NL, 0)
        if not len(self.items):
            return np.full(at_NL.shape, -1, np.int32)
        taken = self.items[np.minimum(at_NL, len(self.items) - 1)]
        return np.where(back_NL >= 0, taken, -1).astype(np.int32)
