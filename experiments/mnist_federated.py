"""Federated averaging on MNIST (McMahan et al. 2017): 100 clients, Dirichlet 0.3, 10 of them in each round.

python run.py --experiment mnist_federated --data.dir DIR
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.strategies import Federated
from spmd.tasks import Classification
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

ROUND = 100  # steps


def config() -> Experiment:
    """50 rounds; a client passes twice over its examples, 20 at a time."""
    return Experiment(
        model=MLP(inputs=784, hidden=(200,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=10 * 20,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.1, momentum=0.0, schedule="constant"),
        strategy=Federated(clients=100, fraction=0.1, alpha=0.3, period=ROUND, local_epochs=2),
        train=TrainConfig(steps=50 * ROUND, steps_per_dispatch=10),
        eval=EvalConfig(every=5 * ROUND),
        checkpoint=CheckpointConfig(every=10 * ROUND),
    )
