"""A small experiment of a user, whose data a test may spoil."""

from __future__ import annotations

import textwrap

FILE = '''"""Three classes, or a text of ten tokens, from arrays that a test may spoil."""

import dataclasses

import numpy as np

from spmd import Experiment
from spmd.data import Arrays, DataConfig
from spmd.data.augment import Crop, Flip, Mixup
from spmd.models.mlp import MLP
from spmd.models.transformer import Transformer
from spmd.optim import SGD
from spmd.tasks import Classification, LanguageModel
from spmd.train import CheckpointConfig, TrainConfig

LANGUAGE = {language}


def arrays(split):
    rng = np.random.default_rng(0)
    if LANGUAGE:
        data = {{name: rng.integers(0, 10, (32, 8)).astype("int32") for name in ("tokens", "targets")}}
    else:
        image = rng.normal(size=(32, 3, 2, 1)).astype("float32")
        data = {{"image": image, "label": rng.integers(0, 3, 32).astype("int32")}}
    {spoil}
    return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(DataConfig):
    """A source of the user's, which nothing has checked."""

    def open(self, split):
        return Source(arrays(split))


class Source:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(next(iter(self.data.values())))

    def take(self, indices):
        return {{name: x[indices] for name, x in self.data.items()}}


def config():
    tokens = ((8,), "int32")
    features = {{"image": ((3, 2, 1), "float32"), "label": ((), "int32")}}
    if LANGUAGE:
        features = {{"tokens": tokens, "targets": tokens}}
    model = MLP(inputs=6, classes=3, hidden=(8,))
    small = Transformer(vocab=10, length=8, layers=1, embed=8, heads=1, mlp=8)
    return Experiment(
        model=small if LANGUAGE else model,
        task=LanguageModel() if LANGUAGE else Classification(),
        data=Own(batch_size=8, features=features, transforms=({transforms})),
        optimizer=SGD(learning_rate=0.1),
        train=TrainConfig(steps=4),
    )
'''


def write(path, spoil, transforms="", language=False):
    text = FILE.format(
        spoil=textwrap.indent(spoil, "    ").strip(), transforms=transforms, language=language
    )
    (path / "own.py").write_text(text)
