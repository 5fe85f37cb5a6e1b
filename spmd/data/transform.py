"""Transforms of examples: whole batches in numpy, each draw a hash of (seed, draw number, stream position).

So an example is transformed the same way whatever processes, threads, devices or steps per dispatch read it
and wherever the run resumed, and in each epoch another way.
"""

# N examples of this process

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from spmd.core.fields import check
from spmd.data import ragged

if TYPE_CHECKING:
    from spmd.data import Features, Source
    from spmd.data.skips import Skips

Batch = dict[str, Any]
BatchTransform = Callable[[Batch, np.ndarray], Batch]  # (batch, stream positions [N]) -> batch
ADDED = ("example_id", "weight")  # features that the loader adds, which no transform sees
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of examples; a subclass is a frozen dataclass, compared by its values.

    partners: how many other examples each example is given, drawn over the whole source and passed through
    the transforms before this one. draw_numbers: see `_number_draws`; empty for all but the oldest classes.
    """

    name: ClassVar[str] = ""
    partners: ClassVar[int] = 0
    draw_numbers: ClassVar[tuple[int, ...]] = ()

    def features(self, features: Features) -> Features:
        """The features after the transform, {name: (shape, dtype)}; ValueError when it cannot take these."""
        return features

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        """{feature: [N, ...]} as `features` declares it; the arrays given are the source's, not to change.

        A feature declared as "bytes", or with sizes that differ (-1), is a list, or an object array [N].
        """
        raise NotImplementedError


class Partners(NamedTuple):
    """Another example for each of N: {feature: [N, ...]}, and bool [N], False where its record is bad."""

    batch: Batch
    good_N: np.ndarray


class Draws:
    """Random numbers of one call of a transform, its partners, and the rows that it finds to be bad.

    partners: one `Partners` for each that the transform asks for. bad: {row: why}, which the transform adds
    to; such a row weighs nothing, and counts against data.skip_bad.
    """

    def __init__(
        self, seed: int, number: int, position_N: np.ndarray, partners: Sequence[Partners] = ()
    ):
        self._seed, self._number, self._position_N = seed, number, position_N
        self.partners = tuple(partners)
        self.bad: dict[int, str] = {}

    @property
    def num(self) -> int:
        """N, the number of rows."""
        return len(self._position_N)

    def uniform(self) -> np.ndarray:
        """[N] float64 in [0, 1), independent of those of the calls before."""
        self._number += 1
        return uniform(self._seed, self._number - 1, self._position_N)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of uint64 that scatters all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, draw: int, position_N: np.ndarray) -> np.ndarray:
    """[N] float64 in [0, 1): a pure function of its arguments, independent over each of them."""
    key_1 = mix_bits(np.array([seed % 2**64], np.uint64) + _GAMMA)
    key_1 = mix_bits(key_1 + np.array([(draw + 1) % 2**64], np.uint64) * _GAMMA)
    bits_N = mix_bits(key_1 + (position_N.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits_N >> np.uint64(11)) * 2.0**-53


def declare(transforms: Sequence[Transform], features: Features) -> list[Features]:
    """The features before the first transform and after each; ValueError when one cannot take them."""
    stages: list[Features] = [features]
    for transform in transforms:
        after = {
            name: (tuple(shape), str(dtype))
            for name, (shape, dtype) in transform.features(stages[-1]).items()
        }
        for name in ADDED:
            check(
                name not in after,
                f"{transform!r}: the feature name {name!r} is the loader's own",
            )
        stages.append(after)
    return stages


def close(features: Features, transforms: Sequence[Transform], split: str) -> Features:
    """The features after the last transform; ValueError where one is not yet an array of one shape."""
    for name, (shape, dtype) in features.items():
        if not ragged.is_open(shape, dtype):
            continue
        field = "data.transforms" if split == "train" else "data.eval_transforms"
        names = ",".join(t.name or type(t).__name__ for t in transforms) or "none"
        what = "still encoded" if dtype == ragged.BYTES else "of different sizes"
        needed = "decode,resize:PIXELS" if dtype == ragged.BYTES else "resize:PIXELS"
        raise ValueError(
            f"feature {name!r} is {what} after {field} ({names}); a batch needs arrays of one shape: give"
            f" {needed}, or decode and random_resized_crop:PIXELS or central_crop:PIXELS"
        )
    return features


def _number_draws(transforms: Sequence[Transform]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(number of the first draw, that of the first draw of each partner) for each transform of a stream.

    The transform at place i draws at 2^32 (i + 1) and on, its partners at scattered numbers. The classes with
    `draw_numbers` draw there instead, unless one before has taken them, so that their pixels depend neither
    on their place nor on the transforms beside them.
    """
    taken: set[int] = set()
    for i, transform in enumerate(transforms):
        first, *rest = transform.draw_numbers or (0,)
        if transform.draw_numbers and first not in taken:
            taken.add(first)
            yield first, tuple(rest)
            continue
        first = (i + 1) << 32
        seeds = np.arange(first + 1, first + 1 + transform.partners, dtype=np.uint64)
        yield first, tuple(int(bits) for bits in mix_bits(seeds * _GAMMA))


class Pipeline:
    """The transforms of a split, in their order: (batch, stream position int64 [N]) -> batch.

    features: of the source. source: where partners are drawn. skips: bad records that may pass. examples:
    those of the source that may be partners, by default all.
    """

    def __init__(
        self,
        transforms: Sequence[Transform],
        features: Features,
        source: Source,
        seed: int,
        skips: Skips,
        examples: range | None = None,
    ):
        self._transforms, self._source, self._seed, self._skips = transforms, source, seed, skips
        self._examples = range(len(source)) if examples is None else examples
        self._stages = declare(transforms, features)
        self._numbers = list(_number_draws(transforms))

    @property
    def input(self) -> Features:
        """The features that it takes."""
        return self._stages[0]

    @property
    def output(self) -> Features:
        """The features that it gives."""
        return self._stages[-1]

    def __call__(self, batch: Batch, position_N: np.ndarray) -> Batch:
        added = {name: batch[name] for name in ADDED if name in batch}
        given = {name: x for name, x in batch.items() if name not in added}
        ids = added.get("example_id")
        example_N = position_N if ids is None else np.maximum(ids, 0).astype(np.int64)
        rows, good_N = self._run(len(self._transforms), given, position_N, 0, example_N)
        if "weight" in added and not good_N.all():
            added["weight"] = added["weight"] * good_N.astype(added["weight"].dtype)
        return rows | added

    def _run(
        self, count: int, batch: Batch, position_N: np.ndarray, start: int, example_N: np.ndarray
    ) -> tuple[Batch, np.ndarray]:
        """(the batch after the first `count` transforms, whether each row is good: bool [N]).

        start: number that the stream's draws begin at. example_N: the examples, to name bad ones.
        """
        good_N = np.ones(len(position_N), bool)
        for i, transform in enumerate(self._transforms[:count]):
            first, partners_first = self._numbers[i]
            partners = [self._partners(i, position_N, start + begin) for begin in partners_first]
            draws = Draws(self._seed, start + first, position_N, partners)
            batch = ragged.columns(transform(batch, draws))
            check_output(transform, batch, self._stages[i + 1], len(position_N))
            for row, reason in draws.bad.items():
                self._skips.note(self._source, int(example_N[row]), reason)
                good_N[row] = False
        return batch, good_N

    def _partners(self, place: int, position_N: np.ndarray, start: int) -> Partners:
        """Partners of the transform at `place`; which examples they are is the draw before their stream's."""
        u_N = uniform(self._seed, start - 1, position_N)
        example_N = (u_N * len(self._examples)).astype(np.int64) + self._examples.start
        taken, good_N = self._skips.take(self._source, example_N)
        batch = {name: taken[name] for name in self._stages[0]}
        rows, decoded_N = self._run(place, batch, position_N, start, example_N)
        return Partners(rows, good_N & decoded_N)


def check_output(transform: Any, batch: Mapping[str, Any], declared: Features, num: int) -> None:
    """ValueError unless the output of a transform is what its `features` declares.

    Args:
      transform: for the message.
      batch: the output, `{feature: [N, ...]}`.
      declared: `{feature: (shape, dtype)}` of an example.
      num: N.
    """
    for name in sorted({*batch, *declared}):
        given = "nothing"
        if name in batch:
            x = batch[name]
            array = isinstance(x, np.ndarray)
            given = f"{x.dtype}{list(x.shape)}" if array else f"a {type(x).__name__}"
        expected = "nothing"
        if name in declared:
            shape, dtype = declared[name]
            expected = f"{dtype}{[num, *shape]}"
            if ragged.is_open(shape, dtype):  # of each example its own size
                expected = f"object[{num}]"
        check(
            given == expected,
            f"{transform!r}: feature {name!r} is declared {expected} and the transform gives {given}"
            f" (for {num} examples)",
        )
