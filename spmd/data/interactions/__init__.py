"""Logs of users and items: ratings, pairs of user and item, histories by user and time.

Raw ids become rows of a vocabulary that is built once and recorded with the run. Without files the log is
generated, so that an experiment runs anywhere.
"""

# E events, N examples, L items of a history

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import tyro

from spmd.core.fields import check, free, located
from spmd.data import DataConfig, Source, Split
from spmd.data.interactions.generated import Generated
from spmd.data.transform import Transform

if TYPE_CHECKING:
    import numpy as np

    from spmd.data.content import Content
    from spmd.data.interactions.log import IndexedLog
    from spmd.data.interactions.splitting import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class InteractionLog(DataConfig):
    """The base of logs of users and items; a subclass says what an example is."""

    files: tuple[str, ...] = located(())
    """Files of the log: u.data or others of its form, .csv, .tsv, .parquet, .arrow; empty is `generated`."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on (u1.test, say), in place of a split."""
    columns: tuple[str, str, str, str] = ("user", "item", "rating", "timestamp")
    """Columns of user, item, rating and time; the order of a text without a header."""
    titles: str = free("")
    """File of titles to print beside items: lines `item|title|...`, as u.item."""
    split: Literal["ratio", "last"] = "ratio"
    """Parts to train, validate and test on: at random within each user, or by time: the last event of a user
    is its test, the one before it its validation."""
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of the parts of split=ratio."""
    split_seed: int = 0
    """Seed of split=ratio."""
    least: int = 1
    """Ids that occur fewer times share the row of unknown ids."""
    generated: Generated = dataclasses.field(default_factory=Generated)
    """The log where no files are given."""
    user_ids: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Raw ids of the users, in the order of their rows; recorded by the run."""
    item_ids: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Raw ids of the items."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            len(self.ratios) == 3 and min(self.ratios) >= 0 and self.ratios[0] > 0,
            f"data.ratios={' '.join(map(str, self.ratios))} must be three shares, that of training above 0",
        )
        check(self.least >= 1, f"data.least={self.least} must be at least 1")
        check(self.split_seed >= 0, f"data.split_seed={self.split_seed} must not be negative")
        check(
            bool(self.files) or not self.eval_files,
            "data.eval_files are given and data.files are not; name the files to train on",
        )

    def found(self, recorded: Mapping[str, Any] | None = None) -> InteractionLog:
        """With the raw ids: those that a run recorded, or of the files; a generated log has its own."""
        before = bool((recorded or {}).get("item_ids"))
        check(
            recorded is None or before == bool(self.files),
            "the run was trained on files: name them, --data.files FILE"
            if before
            else "the run was trained on a generated log: leave out data.files, or name another --run.dir",
        )
        if not self.files or self.item_ids:
            return self
        ids = {name: tuple((recorded or {}).get(name, ())) for name in ("user_ids", "item_ids")}
        if not all(ids.values()):
            users, items = self.log.users, self.log.items
            ids = {"user_ids": users.record(), "item_ids": items.record()}
        return dataclasses.replace(self, **ids)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Rows of users and items, the row of unknown ones included; the model's where it has 0."""
        if self.files:
            return {"users": len(self.user_ids) + 1, "items": len(self.item_ids) + 1}
        return {"users": self.generated.users + 1, "items": self.generated.items + 1}

    @property
    def log(self) -> IndexedLog:
        """The events; read once."""
        from spmd.data.interactions import log

        return log.load(self)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files; a generated log follows from the config."""
        from spmd.data import content

        files = (*self.files, *self.eval_files)
        return content.describe_files(files) if files else content.describe_source(source())

    def queries(self, users: np.ndarray, part: Part) -> dict[str, Any]:
        """The features by which a model knows users, before the events of a part.

        Args:
            users: rows int [N].
            part: whose events are to be predicted; `all`: those after the log.

        Returns:
            {feature: [N, ...]}.
        """
        raise NotImplementedError

    def _declare(self, **features: tuple[tuple[int, ...], str]) -> None:
        object.__setattr__(self, "features", features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingLog(InteractionLog):
    """Ratings of items by users: features `user`, `item`, `rating`."""

    def __post_init__(self) -> None:
        self._declare(user=((), "int32"), item=((), "int32"), rating=((), "float32"))
        super().__post_init__()

    def open(self, split: Split) -> Source:
        """The ratings of a split."""
        from spmd.data.interactions import log

        return log.RatingSource(self.log, split)

    def queries(self, users: np.ndarray, part: Part) -> dict[str, Any]:
        """The rows of the users."""
        return {"user": users.astype("int32")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLog(InteractionLog):
    """Pairs of a user and an item that it chose, ratings aside: features `user`, `item`, `history` (other
    items of the user), `share` (of the item among all training events), and `negatives`, drawn at random.
    """

    history: int = 50
    """Items of a user's history, the last ones; the item itself is not among them."""
    negatives: int = 8
    """Items drawn for each pair, evenly from all but the pair's own."""

    def __post_init__(self) -> None:
        check(self.history >= 1, f"data.history={self.history} must be at least 1")
        check(self.negatives >= 1, f"data.negatives={self.negatives} must be at least 1")
        pair = dict.fromkeys(("user", "item"), ((), "int32"))
        self._declare(**pair, history=((self.history,), "int32"), share=((), "float32"))
        super().__post_init__()

    def transforms_of(self, split: Split) -> tuple[Transform, ...]:
        """The draw of negatives, then those that are given."""
        draw = Negatives(count=self.negatives, items=max(2, self.sizes["items"] - 1))
        return (draw, *super().transforms_of(split))

    def open(self, split: Split) -> Source:
        """The pairs of a split."""
        from spmd.data.interactions import log

        return log.PairSource(self.log, split, self.history)

    def queries(self, users: np.ndarray, part: Part) -> dict[str, Any]:
        """The rows of the users, and their histories."""
        history = self.log.before(part).last(users, self.history)
        return {"user": users.astype("int32"), "history": history}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HistoryLog(InteractionLog):
    """Items of a user in the order of time: features `history` [L] and `targets` [L], the item after each; -1
    where there is none. Long histories are several examples.
    """

    split: Literal["ratio", "last"] = "last"
    length: int = 50
    """Items of an example."""
    stride: int = 0
    """Items between the ends of the examples of a user; 0 is half of the length."""

    def __post_init__(self) -> None:
        check(self.length >= 1, f"data.length={self.length} must be at least 1")
        check(self.stride >= 0, f"data.stride={self.stride} must not be negative")
        self._declare(**dict.fromkeys(("history", "targets"), ((self.length,), "int32")))
        super().__post_init__()

    def open(self, split: Split) -> Source:
        """The histories of a split; of the evaluation, the last target counts."""
        from spmd.data.interactions import log

        return log.HistorySource(self.timed, split, self.length, self.stride)

    @property
    def timed(self) -> IndexedLog:
        """The log; ValueError where it has no times."""
        return self.log.check_timed(f"histories ({type(self).__name__})", self.columns[3])

    def queries(self, users: np.ndarray, part: Part) -> dict[str, Any]:
        """The last items of the users."""
        return {"history": self.timed.before(part).last(users, self.length)}


@dataclasses.dataclass(frozen=True)
class Negatives(Transform):
    """Items drawn evenly from all but the pair's own: feature `negatives` [count]."""

    count: int = 8
    items: int = 2

    def features(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """With `negatives`."""
        return {**features, "negatives": ((self.count,), "int32")}

    def __call__(self, batch: dict[str, Any], draws: Any) -> dict[str, Any]:
        """Draws of (seed, position): the same in every process and after every restart."""
        import numpy as np

        drawn = np.stack([draws.uniform() for _ in range(self.count)], axis=1)
        drawn = (drawn * (self.items - 1)).astype(np.int32)
        return {**batch, "negatives": drawn + (drawn >= batch["item"][:, None]).astype(np.int32)}
