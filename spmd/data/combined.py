"""Batches whose rows come from several sources, also unlike ones: two tasks on two data sets."""

# N examples of this process, K parts

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from spmd.core.fields import check
from spmd.data import DataConfig, Features, Source, Split, ragged
from spmd.data.mixing import MixedOrder, Turns, check_weights
from spmd.data.skips import Skips, bad_records
from spmd.data.transform import ADDED, Batch, BatchTransform, Pipeline

if TYPE_CHECKING:
    from spmd.data.content import Content

SOURCE = "source"  # the feature that says which part a row is from


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combined(DataConfig):
    """Several data sets, read in turn by weight; a row has the features of all.

    The feature `source` int32 [] is the number of the part whose example a row is. Features that this part
    lacks are zeros: a task counts its terms by `batch["source"] == k`. After any number of examples each part
    is within one example of its share, shuffled by itself and repeated as its share requires. Evaluation
    reads all parts once. Transforms are those of the parts.
    """

    parts: tyro.conf.Suppress[tuple[DataConfig, ...]]
    """The data sets; their batch sizes, threads and skip_bad are those of the combined data."""
    weights: tuple[float, ...]
    """Share of the examples for each part; they need not add up to one."""
    features: tyro.conf.Suppress[Features] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_weights(self.weights, len(self.parts))
        check(
            not self.transforms and not self.eval_transforms,
            "the transforms of combined data are those of its parts: leave data.transforms and"
            " data.eval_transforms empty",
        )
        for k, part in enumerate(self.parts):
            check(bool(part.features), f"part {k} of the combined data declares no features")
        object.__setattr__(self, "features", join_features([p.features for p in self.parts]))
        super().__post_init__()

    def transformed_features(self, split: Split) -> Features:
        """Those of all parts, each after its transforms."""
        return join_features([part.transformed_features(split) for part in self.parts])

    def found(self, recorded: Mapping[str, Any] | None = None) -> Combined:
        """With the names of the classes of the parts."""
        parts = []
        for k, part in enumerate(self.parts):
            prefix = f"parts.{k}."
            mine = {
                name.removeprefix(prefix): x
                for name, x in (recorded or {}).items()
                if name.startswith(prefix)
            }
            parts.append(part.found(None if recorded is None else mine))
        alike = all(new is old for new, old in zip(parts, self.parts, strict=True))
        return self if alike else dataclasses.replace(self, parts=tuple(parts))

    @property
    def num_classes(self) -> int:
        """Number of classes, where all parts that know theirs have as many; else 0."""
        nums = {part.num_classes for part in self.parts if part.num_classes}
        return nums.pop() if len(nums) == 1 else 0

    def open(self, split: Split) -> CombinedSource:
        """The examples of all parts; in training they take turns."""
        parts = [dataclasses.replace(part, skip_bad=self.skip_bad) for part in self.parts]
        sources = [part.open_checked(split) for part in parts]
        return CombinedSource(sources, [part.features for part in parts], self.weights)

    def pipeline(
        self,
        split: Split,
        source: Source,
        seed: int,
        skips: Skips | None = None,
        features: Features | None = None,
    ) -> BatchTransform | None:
        """The transforms of each part on its rows; their partners are examples of the same part."""
        if not any(part.transforms_of(split) for part in self.parts):
            return None
        skips, given = skips or self.skips(split), features or self.features
        check(
            SOURCE in given,
            f"the transforms of combined data need the feature {SOURCE!r}, the number of the part",
        )
        pipelines = []
        for k, part in enumerate(self.parts):
            declared = {name: shape for name, shape in part.features.items() if name in given}
            examples = source.examples[k] if isinstance(source, CombinedSource) else range(0)
            pipelines.append(
                Pipeline(part.transforms_of(split), declared, source, seed, skips, examples)
            )
        return _Rows(pipelines)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """That of all parts, part by part."""

        def opened(k: int) -> Source:
            combined = source()
            assert isinstance(combined, CombinedSource)
            return combined.sources[k]

        return [
            entry._replace(name=f"{k}: {entry.name}")
            for k, part in enumerate(self.parts)
            for entry in part.content(split, lambda k=k: opened(k))
        ]

    def tokenizer_content(self) -> Content:
        """Those of the parts that have one."""
        return [
            entry._replace(name=f"{k}: {entry.name}")
            for k, part in enumerate(self.parts)
            for entry in part.tokenizer_content()
        ]

    def check_model(self, model: Any) -> None:
        """ValueError when the model does not fit one of the parts."""
        for part in self.parts:
            part.check_model(model)


def join_features(parts: Sequence[Features]) -> Features:
    """The features of all parts and `source`; ValueError where two parts have unlike ones of one name."""
    joined: dict[str, tuple[tuple[int, ...], str]] = {}
    first: dict[str, int] = {}
    for k, features in enumerate(parts):
        check(
            SOURCE not in features,
            f"part {k} of the combined data has a feature {SOURCE!r}, which is the name for its number",
        )
        for name, (shape, dtype) in features.items():
            other_shape, other_dtype = joined.setdefault(name, (shape, dtype))
            j = first.setdefault(name, k)
            check(
                (other_shape, other_dtype) == (shape, dtype),
                f"feature {name!r} is {other_dtype}{list(other_shape)} in part {j} of the combined data and"
                f" {dtype}{list(shape)} in part {k}: give them two names, or one shape and type",
            )
    return {**joined, SOURCE: ((), "int32")}


def _rows_of_parts(part_N: np.ndarray, num: int) -> Iterator[tuple[int, np.ndarray]]:
    """(part, its rows) for each part that has any."""
    for k in range(num):
        rows = np.flatnonzero(part_N == k)
        if len(rows):
            yield k, rows


class CombinedSource:
    """The examples of several sources, numbered through; features that a part lacks are zeros.

    examples: the numbers of each part's examples.
    """

    def __init__(
        self, sources: Sequence[Source], features: Sequence[Features], weights: Sequence[float]
    ):
        self.sources, self._features = sources, features
        self._joined = join_features(features)
        self._turns = Turns(weights)
        ends = np.cumsum([len(s) for s in sources])
        self._ends_K = ends
        self.examples = [
            range(int(end) - len(s), int(end)) for s, end in zip(sources, ends, strict=True)
        ]
        self.bad = {
            i + examples.start: reason
            for s, examples in zip(sources, self.examples, strict=True)
            for i, reason in bad_records(s).items()
        }

    @property
    def skipped(self) -> tuple[str, ...]:
        """Why records of the parts could not be read when they were opened."""
        return tuple(
            reason
            for s in self.sources
            for reason in getattr(s, "skipped", ()) or bad_records(s).values()
        )

    def __len__(self) -> int:
        return int(self._ends_K[-1])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Examples at `indices` int64 [N] -> {feature: [N, ...]}."""
        part_N = np.searchsorted(self._ends_K, indices, side="right")
        batch = _zeros(self._joined, len(indices)) | {SOURCE: part_N.astype(np.int32)}
        for k, rows in _rows_of_parts(part_N, len(self.sources)):
            taken = self.sources[k].take(indices[rows] - self.examples[k].start)
            for name, (shape, dtype) in self._features[k].items():
                check(name in taken, f"part {k} of the combined data has no feature {name!r}")
                x = taken[name]
                if dtype == ragged.BYTES:
                    batch[name][rows] = ragged.column(x)
                    continue
                check(
                    x.shape == (len(rows), *shape) and x.dtype == dtype,
                    f"feature {name!r} of part {k} of the combined data is {x.dtype}{list(x.shape[1:])}, the"
                    f" experiment declares {dtype}{list(shape)}",
                )
                batch[name][rows] = x
        return batch

    def order(self, seed: int) -> MixedOrder:
        """The order of training, parts with an order of their own in that one: the loader asks for it."""
        from spmd.data.loader import Ordered  # which imports jax

        own = {
            k: s.order(mix_seed(seed, k))
            for k, s in enumerate(self.sources)
            if isinstance(s, Ordered)
        }
        return MixedOrder(self._turns, [len(s) for s in self.sources], seed, own)

    def name_of(self, index: int) -> str:
        """Name of an example: the part, and its name or number there."""
        k = int(np.searchsorted(self._ends_K, index, side="right"))
        local = index - self.examples[k].start
        name_of = getattr(self.sources[k], "name_of", None)
        return f"part {k}, {name_of(local) if name_of else f'example {local}'}"


def mix_seed(seed: int, part: int) -> int:
    """The seed of a part's own order, another one for each part."""
    return seed * 1009 + part + 1


def _zeros(features: Features, num: int) -> Batch:
    return {name: ragged.zeros(num, shape, dtype) for name, (shape, dtype) in features.items()}


class _Rows:
    """(batch, stream position [N]) -> batch: each row through the pipeline of its part."""

    def __init__(self, pipelines: Sequence[Pipeline]):
        self._pipelines = pipelines
        self._features = join_features([p.output for p in pipelines])

    def __call__(self, batch: Batch, position_N: np.ndarray) -> Batch:
        kept = {name: batch[name] for name in (*ADDED, SOURCE) if name in batch}
        out = _zeros(self._features, len(position_N)) | kept
        for k, rows in _rows_of_parts(batch[SOURCE], len(self._pipelines)):
            pipeline = self._pipelines[k]
            part = pipeline({name: batch[name][rows] for name in pipeline.input}, position_N[rows])
            for name, x in part.items():
                out[name][rows] = x
        return out
