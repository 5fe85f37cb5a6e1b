"""A log in memory: events as rows of its vocabularies, in parts, and the examples of each part."""

# E events, U users, N examples or users as asked for, L items of a history

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from spmd.core.fields import check
from spmd.data import Split
from spmd.data.interactions import splitting
from spmd.data.interactions.events import Events, read
from spmd.data.interactions.splitting import TEST, TRAIN, VALIDATION, Lists, Part
from spmd.data.interactions.vocabulary import Vocabulary

if TYPE_CHECKING:
    from spmd.data.interactions import InteractionLog


@dataclasses.dataclass(frozen=True, eq=False)
class IndexedLog:
    """Events in parts.

    users, items: vocabularies. user_E, item_E: rows, int32. rating_E: float32. time_E: int64, None without.
    part_E: int8, as in splitting; evaluated: the part that the evaluation reads.
    """

    users: Vocabulary
    items: Vocabulary
    user_E: np.ndarray
    item_E: np.ndarray
    rating_E: np.ndarray
    time_E: np.ndarray | None
    part_E: np.ndarray
    evaluated: int

    def check_timed(self, reader: str, column: str) -> IndexedLog:
        """This log; ValueError where it has no times."""
        check(
            self.time_E is not None,
            f"{reader} are ordered by time, and the log has no column {column!r}; name it by data.columns, or"
            " use a log with timestamps",
        )
        return self

    @functools.lru_cache(maxsize=8)  # noqa: B019 (logs are cached, and few)
    def lists(self, *parts: int) -> Lists:
        """The items of each user in these parts, by time where there is one."""
        rows = np.isin(self.part_E, parts)
        key_E = np.arange(len(self.user_E)) if self.time_E is None else self.time_E
        return Lists.build(self.user_E[rows], self.item_E[rows], key_E[rows], self.users.rows)

    def before(self, part: Part) -> Lists:
        """The items of each user that precede those of a part: of training, and for a test of validation."""
        if part == "all":
            return self.lists(TRAIN, VALIDATION, TEST)
        return self.lists(*((TRAIN, VALIDATION) if part == "test" else (TRAIN,)))

    def of(self, part: Part) -> Lists:
        """The items of each user in a part."""
        if part == "all":
            return self.before(part)
        number = {"train": TRAIN, "validation": self.evaluated, "test": TEST}[part]
        return self.lists(number)

    def rows(self, split: Split) -> np.ndarray:
        """Numbers of the events of a split."""
        return np.flatnonzero(self.part_E == (TRAIN if split == "train" else self.evaluated))


def load(config: InteractionLog) -> IndexedLog:
    """The log of a config; of one process, it is read once."""
    files = tuple(map(os.path.expanduser, (*config.files, *config.eval_files)))
    stamps = tuple((os.path.getmtime(f), os.path.getsize(f)) for f in files if os.path.exists(f))
    fields = ("files", "eval_files", "columns", "split", "ratios", "split_seed", "least")
    return _load(
        stamps,
        config.generated,
        *(getattr(config, f) for f in fields),
        config.user_ids,
        config.item_ids,
    )


@functools.lru_cache(maxsize=4)
def _load(
    stamps, generated, files, eval_files, columns, split, ratios, seed, least, user_ids, item_ids
):
    del stamps
    events = read(files, columns, "data.files") if files else generated.draw()
    given = read(eval_files, columns, "data.eval_files") if eval_files else None
    num = len(events)
    if given is not None:
        events = _join(events, given)
    build = lambda words, raw: (
        Vocabulary.restore(words) if words else Vocabulary.build(raw, least=least)
    )
    users, items = build(user_ids, events.user), build(item_ids, events.item)
    check(len(users) > 0 and len(items) > 0, f"data.least={least} leaves no users or no items")
    user_E, item_E = users.index(events.user), items.index(events.item)
    evaluated = VALIDATION
    if given is not None:
        part_E = np.where(np.arange(len(events)) < num, TRAIN, TEST).astype(np.int8)
        evaluated = TEST
    elif split == "ratio":
        part_E = splitting.by_ratio(user_E, ratios, seed)
    else:
        check(
            events.time is not None,
            f"data.split=last orders the events of a user by time, and the log has no column {columns[3]!r};"
            " name it by data.columns, or use data.split=ratio",
        )
        assert events.time is not None
        part_E = splitting.by_time(user_E, events.time)
    return IndexedLog(users, items, user_E, item_E, events.rating, events.time, part_E, evaluated)


def _join(first: Events, second: Events) -> Events:
    check(
        first.user.dtype.kind == second.user.dtype.kind
        and first.item.dtype.kind == second.item.dtype.kind,
        "data.eval_files: ids are numbers in some files and text in others",
    )
    timed = first.time is not None and second.time is not None
    joined = [np.concatenate(pair) for pair in zip(first[:3], second[:3], strict=True)]
    return Events(*joined, np.concatenate([first.time, second.time]) if timed else None)  # type: ignore[list-item]


class RatingSource:
    """Events of a split, with their ratings."""

    def __init__(self, log: IndexedLog, split: Split) -> None:
        self._log, self._rows = log, log.rows(split)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Events at `indices` [N]."""
        rows, log = self._rows[indices], self._log
        return {"user": log.user_E[rows], "item": log.item_E[rows], "rating": log.rating_E[rows]}


class PairSource:
    """Pairs of a split, with the other items of the user before them."""

    def __init__(self, log: IndexedLog, split: Split, history: int) -> None:
        self._log, self._rows, self._length = log, log.rows(split), history
        self._lists = log.before("train" if split == "train" else "validation")
        counts = np.bincount(log.item_E[log.part_E == TRAIN], minlength=log.items.rows)
        self._share = (np.maximum(counts, 1) / max(1, counts.sum())).astype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Pairs at `indices` [N]."""
        rows = self._rows[indices]
        user, item = self._log.user_E[rows], self._log.item_E[rows]
        longer = self._lists.last(user, self._length + 1)
        own = longer == item[:, None]
        left_out = np.where(own.any(1), own.argmax(1), 0)  # else the oldest
        kept = np.arange(self._length + 1)[None] != left_out[:, None]
        history = longer[kept].reshape(len(rows), self._length)
        return {"user": user, "item": item, "history": history, "share": self._share[item]}


class HistorySource:
    """Windows of the items of each user; of the evaluation, one that ends with the item to predict."""

    def __init__(self, log: IndexedLog, split: Split, length: int, stride: int) -> None:
        self._length, self._last_only = length, split == "eval"
        stride = stride or max(1, length // 2)
        if split == "train":
            self._lists = log.lists(TRAIN)
            lengths = self._lists.lengths
            windows = np.where(
                lengths < 2, 0, 1 + np.maximum(0, lengths - 1 - length + stride - 1) // stride
            )
            self._users = np.repeat(np.arange(len(lengths)), windows)
            first = np.repeat(np.cumsum(windows) - windows, windows)
            self._ends = lengths[self._users] - (np.arange(len(self._users)) - first) * stride
        else:
            self._lists = log.lists(TRAIN, log.evaluated)
            has = (log.of("validation").lengths > 0) & (self._lists.lengths > 1)
            self._users = np.flatnonzero(has)
            self._ends = self._lists.lengths[self._users]

    def __len__(self) -> int:
        return len(self._users)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Windows at `indices` [N]."""
        users, ends = self._users[indices], self._ends[indices]
        both = self._lists.last(users, self._length + 1, ends)
        history, targets = both[:, :-1].copy(), both[:, 1:].copy()
        targets[history < 0] = -1
        if self._last_only:
            targets[:, :-1] = -1
        return {"history": history, "targets": targets}
