"""MNIST with a stale-synchronous parameter server (Ho et al. 2013): parameters four updates old.

python run.py --experiment mnist_stale --data.dir DIR     # 8 simulated devices, half a minute on 2 CPU cores;
                                                          # expect 96.0 % test accuracy

The same as with --strategy.staleness 0 (95.9 %). With `mnist`'s momentum, 0.9, it does not learn (11 %).
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.strategies import Server
from spmd.tasks import Classification
from spmd.train import TrainConfig


def config() -> Experiment:
    """Plain SGD: momentum would delay the late gradients further."""
    return Experiment(
        model=MLP(inputs=784, hidden=(256,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=128,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.2, momentum=0.0, schedule="cosine", warmup_steps=30),
        strategy=Server(staleness=4),
        train=TrainConfig(epochs=5),
        simulate=8,
    )
