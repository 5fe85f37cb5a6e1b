"""A user's experiment that several test modules write and change."""

from __future__ import annotations

FILE = '''"""A user's own experiment: two rings, told apart by a plain NNX network."""

import numpy as np
from flax import nnx

from spmd import Experiment
from spmd.data import Arrays
from spmd.optim import AdamW
from spmd.tasks import Classification
from spmd.train import TrainConfig


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(2, 64, rngs=rngs)
        self.outer = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 2, rngs=rngs)
        EXTRA

    def __call__(self, x):
        x = nnx.relu(self.outer(nnx.relu(self.inner(x))))
        return self.head(APPLY)


def rings(seed, num):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num).astype(np.int32)
    angle = rng.uniform(0, 2 * np.pi, num)
    radius = 1 + label + rng.normal(0, 0.1, num)
    point = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    return {"point": point, "label": label}


def config():
    return Experiment(
        model=Net,
        task=Classification(input="point"),
        data=Arrays(train=lambda: rings(0, 1000), eval=lambda: rings(1, 333), batch_size=64,
                    features={"point": ((2,), "float32"), "label": ((), "int32")}),
        optimizer=AdamW(learning_rate=1e-2),
        train=TrainConfig(steps=200),
    )
'''


def write(tmp_path, extra="pass", apply="x"):
    (tmp_path / "rings.py").write_text(FILE.replace("EXTRA", extra).replace("APPLY", apply))
