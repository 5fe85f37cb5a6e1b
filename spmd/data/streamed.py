"""TFDS sets whose images stay encoded: records are read as batches need them, nothing is decoded before."""

# N examples

from __future__ import annotations

from typing import Any

import numpy as np

from spmd.core.fields import check
from spmd.data import TFDS, Features, ragged, tfds


class RecordSource:
    """Records `start` to `stop` of a prepared split, by random access."""

    def __init__(self, reader: Any, features: Features, start: int, stop: int):
        self._reader, self._features = reader, features
        self._start, self._stop = start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Examples at `indices` int64 [N]; encoded features as bytes."""
        with tfds.quiet():
            examples = self._reader.__getitems__([int(i) + self._start for i in indices])
        batch: dict[str, Any] = {}
        for name, (shape, dtype) in self._features.items():
            values = [example[name] for example in examples]
            if dtype == ragged.BYTES:
                check(
                    all(isinstance(v, bytes) for v in values),
                    f"feature {name!r} is no encoded image: declare its shape and dtype",
                )
                batch[name] = values
                continue
            rows = np.stack([np.asarray(v) for v in values])
            cast = rows.astype(dtype)
            check(
                rows.shape[1:] == tuple(shape) and (cast == rows).all(),
                f"feature {name!r} is {rows.dtype}{list(rows.shape[1:])}, the experiment declares"
                f" {dtype}{list(shape)}",
            )
            batch[name] = cast
        return batch


def open_split(config: TFDS, split: str) -> RecordSource:
    """The records of `split` (`train`, `train[:90%]`)."""
    part = tfds.locate(config, split)
    encoded = [name for name, (_, dtype) in config.features.items() if dtype == ragged.BYTES]
    reader = tfds.open_reader(config, part.directory, part.name, config.features, encoded)
    return RecordSource(reader, config.features, part.start, part.stop)
