"""A generated log of clicks, of any size, without a file: numbers, categories, and whether a user clicked."""

# N examples as read, C categories

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check
from spmd.data import DataConfig, Source, Split

if TYPE_CHECKING:
    from spmd.data.content import Content

_EVAL = 2**40  # first row of the evaluation: no training row has such a number
_NUMBER, _CATEGORY, _LABEL, _EFFECT, _TASTE = (i << 48 for i in range(1, 6))  # streams of draws
BIAS = -1.5  # about a quarter of the rows are clicks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clicks(DataConfig):
    """A generated log of clicks; features `numbers`, `category_00`, ..., and `label`, 1 for a click.

    An id of rank r of a category has a probability of about 1 / r. Each id has an effect on the log odds of a
    click, and so has the agreement of neighbouring categories, which only their product tells. Row i is a
    function of i alone.
    """

    examples: int = 1_000_000
    """Rows to train on."""
    eval_examples: int = 20_000
    """Rows to evaluate on."""
    numbers: int = 13
    """Real values of a row (Criteo's logs have 13)."""
    ids: tuple[int, ...] = tuple(int(10 * 1.4**i) for i in range(26))
    """Number of ids of each category (Criteo's logs have 26 of them)."""

    def __post_init__(self) -> None:
        for name in ("examples", "eval_examples", "numbers"):
            check(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1")
        check(
            len(self.ids) >= 2 and min(self.ids) >= 1,
            f"data.ids={' '.join(map(str, self.ids))}: give two categories or more, of 1 id or more each",
        )
        features = {"numbers": ((self.numbers,), "float32"), "label": ((), "int32")}
        features |= dict.fromkeys(category_names(len(self.ids)), ((), "int32"))
        object.__setattr__(self, "features", features)
        super().__post_init__()

    def open(self, split: Split) -> Source:
        """Rows as they are asked for."""
        return ClickSource(self, split)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """A sample of the rows: they follow from the config."""
        from spmd.data import content

        return content.describe_source(source())


def category_names(num: int) -> list[str]:
    """Names of the features of categories."""
    return [f"category_{i:02}" for i in range(num)]


@dataclasses.dataclass(frozen=True)
class ClickSource:
    """Rows of a log that is generated as it is read."""

    config: Clicks
    split: Split

    def __len__(self) -> int:
        return self.config.examples if self.split == "train" else self.config.eval_examples

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Rows at `indices` [N]."""
        numbers, ids_NC, odds = self.draw(indices)
        clicked = uniform(self._rows(indices), _LABEL) < 1 / (1 + np.exp(-odds))
        names = category_names(len(self.config.ids))
        categories = {name: ids_NC[:, i].astype(np.int32) for i, name in enumerate(names)}
        label = clicked.astype(np.int32)
        return {"numbers": numbers.astype(np.float32), "label": label, **categories}

    def draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(numbers [N, ...], ids [N, C], log odds of a click [N])."""
        row_N1 = self._rows(indices)[:, None]
        columns = np.arange(self.config.numbers, dtype=np.uint64)[None]
        numbers = np.log1p(-np.log(1 - uniform(row_N1, columns + np.uint64(_NUMBER))))
        num_C = np.array(self.config.ids, np.float64)
        column_1C = np.arange(len(num_C), dtype=np.uint64)[None]
        draw_NC = uniform(row_N1, column_1C + np.uint64(_CATEGORY))
        ids_NC = np.floor(np.exp(draw_NC * np.log(num_C + 1))).astype(np.int64) - 1
        ids_NC = np.minimum(ids_NC, num_C.astype(np.int64) - 1)
        # A taste of -1 or 1 and an effect in [-1, 1] of each id.
        key_NC = ids_NC.astype(np.uint64)
        taste_NC = np.sign(uniform(key_NC, column_1C + np.uint64(_TASTE)) - 0.5)
        effect_NC = 2 * uniform(key_NC, column_1C + np.uint64(_EFFECT)) - 1
        agreement = (taste_NC[:, 1:] * taste_NC[:, :-1]).sum(1)
        scale = 1 / np.sqrt(len(num_C))
        odds = BIAS + 2 * scale * effect_NC.sum(1) + scale * agreement
        return numbers, ids_NC, odds + (numbers - numbers.mean(1, keepdims=True))[:, 0]

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        first = 0 if self.split == "train" else _EVAL
        return np.asarray(indices, np.int64).astype(np.uint64) + np.uint64(first)


def uniform(key: np.ndarray, stream: Any) -> np.ndarray:
    """Numbers in [0, 1) as functions of key and stream (two rounds of SplitMix64, Steele et al. 2014)."""
    streams = _mix(np.atleast_1d(np.asarray(stream, np.uint64)))
    mixed = _mix(_mix(key) ^ (streams[0] if np.ndim(stream) == 0 else streams))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    word = functools.partial(np.array, dtype=np.uint64)
    x = x + word([0x9E3779B97F4A7C15])
    x = (x ^ (x >> word([30]))) * word([0xBF58476D1CE4E5B9])
    x = (x ^ (x >> word([27]))) * word([0x94D049BB133111EB])
    return x ^ (x >> word([31]))
