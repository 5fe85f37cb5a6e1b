"""The files of MNIST, Fashion-MNIST and their relatives: images and labels in the idx format."""

from __future__ import annotations

import dataclasses
import gzip
import math
import posixpath
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import tyro

from spmd.core.fields import check, located
from spmd.data import DataConfig, Features, Source, Split, files, splits

if TYPE_CHECKING:
    from spmd.data.content import Content

PREFIXES = {"train": "train", "test": "t10k"}
PARTS = {"image": "images-idx3-ubyte", "label": "labels-idx1-ubyte"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idx(DataConfig):
    """The four files of MNIST's form, train-images-idx3-ubyte.gz and so on, as LeCun published them."""

    path: str = located("")
    """Folder of the four files, gzipped or not. gs:// too."""
    train_split: str = "train"
    """Split to train on, `train` or `test`; slices as in TFDS: train[:90%%]."""
    eval_split: str = "test"
    """Split to evaluate on."""
    size: int = 28
    """Height and width of the images."""
    features: tyro.conf.Suppress[Features] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(self.size >= 1, f"data.size={self.size} must be at least 1")
        for split in (self.train_split, self.eval_split):
            splits.check_form(split)
        features = {"image": ((self.size, self.size, 1), "uint8"), "label": ((), "int32")}
        object.__setattr__(self, "features", features)
        super().__post_init__()

    def open(self, split: Split) -> Source:
        """The arrays of a split, read into memory."""
        from spmd.data.sources import ArraySource

        paths = self._paths(split)
        image_NHWC = read_idx(paths["image"], 3)[..., None]
        label_N = read_idx(paths["label"], 1).astype(np.int32)
        check(
            len(image_NHWC) == len(label_N),
            f"{paths['image']} has {len(image_NHWC)} images, {paths['label']} {len(label_N)} labels;"
            " copy both anew",
        )
        height, width = image_NHWC.shape[1:3]
        check(
            (height, width) == (self.size, self.size),
            f"{paths['image']} holds images of {height} x {width} pixels; the experiment declares"
            f" data.size={self.size}",
        )
        text = self.train_split if split == "train" else self.eval_split
        name = splits.check_form(text)
        _, start, stop = splits.locate(text, {name: len(label_N)}, self.path)
        return ArraySource({"image": image_NHWC, "label": label_N}, self.features, start, stop)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The two files of the split."""
        del source
        from spmd.data import content

        return content.describe_files(list(self._paths(split).values()))

    def _paths(self, split: Split) -> dict[str, str]:
        """{feature: its file}."""
        root = files.locate(self.path, "data.path")
        check(
            files.is_folder(root), f"data.path={self.path!r} is no folder; give that of the files"
        )
        name = splits.check_form(self.train_split if split == "train" else self.eval_split)
        check(name in PREFIXES, f"data.{split}_split={name!r} is neither 'train' nor 'test'")
        present = {f.name: f.path for f in files.below(root, ("ubyte", "ubyte.gz"))}
        paths = {}
        for feature, part in PARTS.items():
            wanted = f"{PREFIXES[name]}-{part}"
            found = [present[n] for n in (wanted, wanted + ".gz") if n in present]
            check(
                bool(found),
                f"{self.path} has no file {wanted} or {wanted}.gz (there:"
                f" {', '.join(map(posixpath.basename, present)) or 'no idx file'}); MNIST and Fashion-MNIST"
                " are published as four such files",
            )
            paths[feature] = found[0]
        return paths


def read_idx(path: str, ndim: int) -> np.ndarray:
    """The array of an idx file of bytes, uint8 of `ndim` dims; ValueError where it is something else.

    The format: two zero bytes, 8 (unsigned bytes), the number of dims, each dim as a big-endian int32, then
    the values in C order.
    """
    data = files.read(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}); copy it anew") from None
    header = 4 + 4 * ndim
    check(
        data[:4] == bytes([0, 0, 8, ndim]) and len(data) >= header,
        f"{path} is no idx file of bytes with {ndim} dims: it begins with {data[:4].hex(' ')}",
    )
    shape = tuple(np.frombuffer(data, ">i4", ndim, 4).tolist())
    check(
        len(data) - header == math.prod(shape),
        f"{path} should have {math.prod(shape)} values after its header ({' x '.join(map(str, shape))}), it"
        f" has {len(data) - header}: copy it anew",
    )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
