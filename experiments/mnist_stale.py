"""mnist with a parameter server whose workers are four updates behind: the momentum of mnist would not bear it.

python run.py --experiment mnist_stale --data.dir DIR     # eight simulated devices
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.strategies import Server
from spmd.tasks import Classification
from spmd.train import TrainConfig


def config() -> Experiment:
    """Plain SGD, warmed up: while the weights move fast, old gradients are wrong ones."""
    return Experiment(
        model=MLP(inputs=784, hidden=(256,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=128,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.2, momentum=0.0, schedule="cosine", warmup_steps=100),
        strategy=Server(staleness=4),
        train=TrainConfig(epochs=5),
        simulate=8,
    )
