"""mnist on eight devices that are a parameter server too: each owns an eighth of parameters and momentum.

python run.py --experiment mnist_server --data.dir DIR   # 8 simulated devices, about 2 min on 2 CPU cores;
                                                         # expect 98.2 %
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.strategies import Server
from spmd.tasks import Classification
from spmd.train import TrainConfig


def config() -> Experiment:
    """The experiment mnist; gradients are pushed to the owners, parameters pulled from them."""
    return Experiment(
        model=MLP(inputs=784, hidden=(256,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=128,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.2, momentum=0.9, nesterov=True, schedule="cosine"),
        strategy=Server(),
        train=TrainConfig(epochs=5),
        simulate=8,
    )
