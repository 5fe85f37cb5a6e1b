"""Input data: configs. Sources read batches, because Python code per example is the bottleneck."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import tyro

from spmd.core.fields import check, free
from spmd.core.storage import cache_root as cache_root
from spmd.core.storage import data_root as data_root

if TYPE_CHECKING:
    import numpy as np

    from spmd.data.content import Content
    from spmd.data.skips import Skips
    from spmd.data.text.tokenizer import Tokenizer

Split = Literal["train", "eval"]
Features = Mapping[str, tuple[tuple[int, ...], str]]


class Source(Protocol):
    """Random access to a data set, by batches."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Examples at `indices` int64 [N] -> {feature: [N, ...]}.

        Any error counts as that of a bad record, which data.skip_bad lets pass.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """How training images vary from epoch to epoch; the image is the feature of shape [H, W, C]."""

    crop: int = 0
    """Pads by this many pixels and cuts the old size at a random place; 0 is off."""
    flip: bool = False
    """Mirrors half of the images, left and right."""
    mixup: float = 0.0
    """Blends two images and their losses by a share from Beta(mixup, mixup); 0 is off (Zhang et al. 2018)."""

    @property
    def active(self) -> bool:
        """Whether anything is on."""
        return bool(self.crop or self.flip or self.mixup)


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
    augment: Augment = dataclasses.field(default_factory=Augment)
    """How training images are varied."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "threads", "buffer"):
            check(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)} must be at least 1")
        check(self.skip_bad >= 0, f"data.skip_bad={self.skip_bad} must not be negative")
        for name in ("example_id", "weight"):
            check(name not in self.features, f"the feature name {name!r} is the loader's own")
        self._check_augment()

    def _check_augment(self) -> None:
        augment = self.augment
        check(augment.crop >= 0, f"data.augment.crop={augment.crop} must not be negative")
        check(augment.mixup >= 0, f"data.augment.mixup={augment.mixup} must not be negative")
        if not augment.active:
            return
        height, width, _ = self.features[self.image()][0]
        check(
            augment.crop < min(height, width),
            f"data.augment.crop={augment.crop} must be less than the image's {height} x {width} pixels",
        )
        if augment.mixup:
            check(
                bool(self.labels()),
                "data.augment.mixup needs a label, an integer feature of shape [];"
                f" the features are {self._shown()}",
            )
            for name in ("mix", *(f"{label}_b" for label in self.labels())):
                check(
                    name not in self.features,
                    f"with data.augment.mixup the feature name {name!r} is the loader's own",
                )

    def _shown(self) -> str:
        return ", ".join(f"{k} {d}{list(s)}" for k, (s, d) in self.features.items()) or "none"

    def image(self) -> str:
        """Name of the one feature of shape [H, W, C]; ValueError when there is none, or more."""
        images = [name for name, (shape, _) in self.features.items() if len(shape) == 3]
        check(
            len(images) == 1,
            f"data.augment needs one image, a feature of shape [H, W, C]; the features are {self._shown()}",
        )
        return images[0]

    def labels(self) -> list[str]:
        """Names of the integer features of shape []."""
        return [k for k, (shape, d) in self.features.items() if not shape and "int" in d]

    def open(self, split: Split) -> Source:
        """The source of a split."""
        raise NotImplementedError

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

    def abstract_batch(self, batch_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of a batch, without touching data."""
        batch = {
            name: ((batch_size, *shape), dtype) for name, (shape, dtype) in self.features.items()
        }
        if self.augment.mixup:
            name, labels = self.image(), self.labels()
            shape, dtype = batch[name]
            batch[name] = (shape, dtype if "float" in dtype else "float32")
            batch |= {f"{label}_b": batch[label] for label in labels}
            batch["mix"] = ((batch_size,), "float32")
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
        """Memory-mapped decoded arrays; decoded once. ValueError says what to type when not prepared."""
        from spmd.data import decoded

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
