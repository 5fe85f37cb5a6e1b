"""Input data: configs. Sources read batches, because Python code per example is the bottleneck."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_args

import tyro

from spmd.core.fields import check, free
from spmd.core.storage import cache_root as cache_root
from spmd.core.storage import data_root as data_root
from spmd.data.transform import BatchTransform, Pipeline, Transform, close, declare

if TYPE_CHECKING:
    import numpy as np

    from spmd.data.content import Content
    from spmd.data.skips import Skips
    from spmd.data.text.tokenizer import Tokenizer

Split = Literal["train", "eval"]
Features = Mapping[str, tuple[tuple[int, ...], str]]


class Source(Protocol):
    """Random access to a data set, by batches; see spmd.data.loader.Ordered for an order of its own."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Examples at `indices` int64 [N] -> {feature: [N, ...]}; a feature of bytes is a list.

        Any error counts as that of a bad record, which data.skip_bad lets pass.
        """
        ...


def _transforms_spec() -> tyro.constructors.PrimitiveConstructorSpec[tuple[Transform, ...]]:
    """The rule for transforms on the command line."""
    from spmd.data import registry

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME:VALUE,...",
        instance_from_str=lambda words: registry.parse(words[0]),
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [registry.text_of(x)],
    )


Transforms = Annotated[tuple[Transform, ...], _transforms_spec()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Base of the data configs; an experiment file may subclass it and override `open`."""

    batch_size: int = 128
    """Global batch: examples per optimizer step, over all devices."""
    eval_batch_size: int = free(1024)
    """Examples per evaluation batch, over all devices."""
    threads: int = free(2)
    """Reader threads; the order of examples does not depend on it."""
    buffer: int = free(4)
    """Batches read ahead."""
    skip_bad: int = free(0)
    """Bad records that may pass, over all processes, in each split: each is an empty row, of weight 0."""
    features: tyro.conf.Suppress[Features] = dataclasses.field(default_factory=dict)
    """Feature name -> (shape, dtype) of one example; the features kept, and what a planner needs."""
    transforms: Transforms = ()
    """Changes of training examples, in their order, as crop:1,flip,mixup:0.2; empty is none."""
    eval_transforms: Transforms = ()
    """Changes of the examples that are evaluated or predicted; empty is none."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "threads", "buffer"):
            check(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1")
        check(self.skip_bad >= 0, f"data.skip_bad={self.skip_bad} must not be negative")
        for name in ("example_id", "weight"):
            check(name not in self.features, f"the feature name {name!r} is the loader's own")
        for split in get_args(Split):
            self.transformed_features(split)

    def transforms_of(self, split: Split) -> tuple[Transform, ...]:
        """The transforms of a split's examples."""
        return self.transforms if split == "train" else self.eval_transforms

    def transformed_features(self, split: Split) -> Features:
        """{feature: (shape, dtype)} after the transforms; ValueError when one cannot take them."""
        transforms = self.transforms_of(split)
        check(
            bool(self.features) or not transforms,
            "data.transforms and data.eval_transforms need data.features, {name: (shape, dtype)}; declare"
            " them",
        )
        return close(declare(transforms, self.features)[-1], transforms, split)

    def pipeline(
        self,
        split: Split,
        source: Source,
        seed: int,
        skips: Skips | None = None,
        features: Features | None = None,
    ) -> BatchTransform | None:
        """The transforms of a split, as the loader takes them; None where there are none.

        Args:
          split: whose transforms.
          source: where transforms draw partners.
          seed: of their draws.
          skips: bad records that may pass.
          features: of the source, by default those that the config declares.
        """
        if not (transforms := self.transforms_of(split)):
            return None
        skips = skips or self.skips(split)
        return Pipeline(transforms, features or self.features, source, seed, skips)

    def open(self, split: Split) -> Source:
        """The source of a split."""
        raise NotImplementedError

    def found(self, recorded: Mapping[str, Any] | None = None) -> DataConfig:
        """The config with what its data tells: names of classes. recorded: the data fields of a run."""
        del recorded
        return self

    @property
    def num_classes(self) -> int:
        """Number of classes of the data; 0 where it knows none."""
        return 0

    @property
    def sizes(self) -> Mapping[str, int]:
        """Numbers that a model's fields of these names take where they are 0."""
        return {}

    def open_all(self) -> Source:
        """All examples, to predict: those of the evaluation, unless the data is one folder or file."""
        return self.open_checked("eval")

    def open_checked(self, split: Split) -> Source:
        """`open`; ValueError where the split has no example."""
        source = self.open(split)
        check(
            len(source) > 0,
            f"the {'training' if split == 'train' else 'evaluation'} split holds no examples; give it some",
        )
        return source

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """Fingerprint of a split's content, independent of where it is stored: see spmd.data.content.

        A config that overrides `open` may override it; else the length, the features and a sample of the
        examples are hashed. source: returns the opened split.
        """
        from spmd.data import content

        return content.describe_source(source())

    def tokenizer_content(self) -> Content:
        """Fingerprint of the tokenizer; empty where the data has none."""
        return []

    def skips(self, split: str) -> Skips:
        """The bad records of a split, and how many may pass."""
        from spmd.data.skips import Skips

        return Skips(split, self.skip_bad, self.features)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer of a text; ValueError for other data."""
        raise ValueError(f"{type(self).__name__} data is no text: it has no tokenizer")

    def check_model(self, model: Any) -> None:
        """ValueError when the model does not fit the data; called when the data has been opened."""

    def abstract_batch(
        self, batch_size: int, split: Split = "train"
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of a batch after its transforms, without touching data."""
        batch = {
            name: ((batch_size, *shape), dtype)
            for name, (shape, dtype) in self.transformed_features(split).items()
        }
        return batch | {
            "example_id": ((batch_size,), "int32"),
            "weight": ((batch_size,), "float32"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFDS(DataConfig):
    """A TensorFlow Datasets set, prepared as array_record; reading needs no TensorFlow."""

    name: str
    """TFDS name: `mnist`, `mnist:3.0.1`, `name/config:version`."""
    dir: str = free("")
    """Data directory; empty is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    train_split: str = "train"
    """Split to train on; slices as in TFDS: train[:90%%]."""
    eval_split: str = "test"
    """Split to evaluate on."""
    cache_dir: str = free("")
    """Where decoded arrays go; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""

    def open(self, split: Split) -> Source:
        """Memory-mapped decoded arrays, decoded once; with features of bytes, the records as they are.

        ValueError says what to type when not prepared.
        """
        from spmd.data import decoded, streamed

        if any(dtype == "bytes" for _, dtype in self.features.values()):
            return streamed.open_split(self, self._split(split))
        return decoded.open_split(self, self._split(split))

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files of the prepared split."""
        del source
        from spmd.data import tfds

        return tfds.split_content(self, self._split(split))

    def _split(self, split: Split) -> str:
        return self.train_split if split == "train" else self.eval_split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays(DataConfig):
    """Arrays in memory, from functions of the experiment file."""

    train: tyro.conf.Suppress[Callable[[], Mapping[str, Any]]]
    """() -> {feature: [N, ...]}."""
    eval: tyro.conf.Suppress[Callable[[], Mapping[str, Any]]]
    """() -> {feature: [N, ...]}."""

    def open(self, split: Split) -> Source:
        """The arrays in memory, checked against `features`."""
        from spmd.data.sources import ArraySource

        return ArraySource((self.train if split == "train" else self.eval)(), self.features)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The bytes of the arrays."""
        from spmd.data import content
        from spmd.data.sources import ArraySource

        arrays = source()
        assert isinstance(arrays, ArraySource)
        return content.describe_arrays(arrays.arrays)
