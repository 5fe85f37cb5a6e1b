"""Every record of a data set read once: bad ones, duplicates, kinds of images, classes."""

# N examples, H height, W width

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spmd.data import DataConfig, Source, decode
from spmd.data.resizing import Decode
from spmd.data.skips import Skips

_AT_ONCE = 256


@dataclasses.dataclass
class Report:
    """Findings about a split.

    num: examples. bad: why records cannot be read. kinds: number of images by their colours, as pillow names
    them, and of those that are rotated. sizes: lowest and highest height, then width. labels: {feature:
    {value: count}}. masks: {value: pixels}. same: pairs of names of examples with the same content.
    """

    num: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sizes: list[int] = dataclasses.field(default_factory=list)
    labels: dict[str, collections.Counter[int]] = dataclasses.field(default_factory=dict)
    masks: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    same: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Checker:
    """Reads splits one after the other; duplicates are found within a split and between them.

    classes: of the model; a mask with others is bad. 0 takes all.
    """

    def __init__(self, data: DataConfig, classes: int = 0):
        self._data, self._classes = data, classes
        self._seen: dict[bytes, tuple[str, str]] = {}  # digest -> (split, name)
        self.between: list[tuple[str, str]] = []

    def check(self, split: Any, source: Source) -> Report:
        """The findings about a split."""
        report = Report(num=len(source), bad=list(getattr(source, "skipped", ())))
        skips = Skips(split, len(source) + 1, self._data.features)
        channels = self._channels(split)
        for first in range(0, len(source), _AT_ONCE):
            rows = np.arange(first, min(first + _AT_ONCE, len(source)))
            batch, good_N = skips.take(source, rows)
            problems = self._decode(batch, channels, report)
            for row, problem in problems.items():
                if good_N[row]:
                    skips.note(source, int(rows[row]), problem)
            good_N = good_N & ~np.isin(np.arange(len(rows)), list(problems))
            self._count(
                split, source, rows[good_N], {k: x[good_N] for k, x in batch.items()}, report
            )
        report.bad += [skips.reasons[i] for i in sorted(skips.reasons)]
        return report

    def _channels(self, split: Any) -> Mapping[str, int]:
        """{encoded feature: channels that the split's transforms decode it to, 0 for a mask}."""
        decoding = [t for t in self._data.transforms_of(split) if isinstance(t, Decode)]
        names = [name for name, (_, dtype) in self._data.features.items() if dtype == "bytes"]
        return decoding[0].channels_of(names) if decoding else {}

    def _decode(self, batch: Any, channels: Mapping[str, int], report: Report) -> dict[int, str]:
        """{row: why it cannot be decoded}; counts the others."""
        problems: dict[int, str] = {}
        sides: dict[int, tuple[int, int]] = {}
        for name, num in channels.items():

            def read(data: bytes, num: int = num) -> tuple[decode.Encoded, np.ndarray | None, str]:
                header = decode.read_header(data, num)
                try:
                    return header, decode.decode(header), ""
                except decode.Undecodable as error:
                    return header, None, str(error)

            for row, (header, pixels, problem) in enumerate(decode.map_rows(read, batch[name])):
                if pixels is None:
                    problems.setdefault(row, f"{name!r}: {problem}")
                    continue
                size = pixels.shape[:2]
                other = sides.setdefault(row, (int(size[0]), int(size[1])))
                if other != size:
                    problems.setdefault(
                        row,
                        f"{name!r} is {size[0]} x {size[1]} pixels, beside {other[0]} x {other[1]}",
                    )
                if num:
                    report.kinds[header.mode] += 1
                    report.kinds["rotated"] += header.orientation != 1
                    report.sizes = _range(report.sizes, size)
                else:
                    values, counts = np.unique(pixels, return_counts=True)
                    if self._classes and values[-1] >= self._classes:
                        problems.setdefault(
                            row,
                            f"{name!r} holds {values[-1]}, and the classes of the model (model.classes) are"
                            f" 0 to {self._classes - 1}",
                        )
                    report.masks.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return problems

    def _count(self, split: str, source: Any, rows: np.ndarray, batch: Any, report: Report) -> None:
        content = []
        for name, x in batch.items():
            if x.ndim == 1 and x.dtype.kind in "iu":
                counts = report.labels.setdefault(name, collections.Counter())
                counts.update(x.tolist())
            elif x.dtype.hasobject or x.ndim > 1:
                content.append(x)
        name_of = getattr(source, "name_of", None)
        for i, row in enumerate(rows.tolist() if content else ()):
            digest = hashlib.blake2b(digest_size=12)
            for x in content:
                digest.update(x[i] if x.dtype.hasobject else np.ascontiguousarray(x[i]).tobytes())
            name = f"{split} {name_of(row) if name_of else row}"
            other_split, other = self._seen.setdefault(digest.digest(), (split, name))
            if other != name:
                (report.same if other_split == split else self.between).append((other, name))


def _range(sizes: list[int], size: Any) -> list[int]:
    """[lowest height, highest, lowest width, highest], with one more image."""
    if not sizes:
        return [size[0], size[0], size[1], size[1]]
    low_h, high_h, low_w, high_w = sizes
    return [
        *(min(low_h, size[0]), max(high_h, size[0])),
        *(min(low_w, size[1]), max(high_w, size[1])),
    ]
