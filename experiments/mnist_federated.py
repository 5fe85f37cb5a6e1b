"""Federated averaging on MNIST, 100 heterogeneous clients, with momentum (Hsu et al. 2019, arXiv 1909.06335).

python run.py --experiment mnist_federated --data.dir DIR    # about 2 minutes on 2 CPU cores; expect 96.5 %

Labels by Dirichlet 0.3, ten clients in each of 50 rounds; 96.7 % measured, over 95 % from round 30 on. Add
`--simulate 2 --mesh.replica 2 --mesh.data 1` to spread the clients, `--strategy.secure` for masked sums.
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.strategies import Federated
from spmd.tasks import Classification
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

ROUND = 75  # steps


def config() -> Experiment:
    """50 rounds; a client runs four epochs over its examples, 32 per step, for at most 75 steps."""
    return Experiment(
        model=MLP(inputs=784, hidden=(200,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=10 * 32,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.3, momentum=0.0, final_fraction=0.05),
        strategy=Federated(
            clients=100,
            fraction=0.1,
            alpha=0.3,
            period=ROUND,
            local_epochs=4,
            outer="nesterov",
            outer_learning_rate=1.0,
            outer_momentum=0.5,
        ),
        train=TrainConfig(steps=50 * ROUND, steps_per_dispatch=25),
        eval=EvalConfig(every=5 * ROUND),
        checkpoint=CheckpointConfig(every=10 * ROUND),
    )
