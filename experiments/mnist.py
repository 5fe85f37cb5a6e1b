"""MNIST (LeCun et al. 1998) by a multilayer perceptron of 784-256-10; 5 epochs.

python run.py --experiment mnist --data.dir DIR     # about 10 s on 2 CPU cores; expect 98.2 % test accuracy
python run.py --experiment mnist --data.dir DIR --simulate 8 --strategy server    # about 1 minute; 98.2 %
python run.py --experiment mnist --data.dir DIR --simulate 8 --strategy allreduce --strategy.reduction ring \\
    --strategy.bidirectional    # about 2 minutes; 98.2 %

The other two compute the same gradients on 8 simulated devices: with a parameter server that the devices
share, and by rings in both directions (Patarasuk and Yuan 2009). benchmarks/mnist_peers.py compares the
speed with the same network under PyTorch's DistributedDataParallel (Li et al. 2020, arXiv 2006.15704).
"""

from spmd import Experiment
from spmd.data import TFDS
from spmd.models.mlp import MLP
from spmd.optim import SGD
from spmd.tasks import Classification
from spmd.train import TrainConfig


def config() -> Experiment:
    """Nesterov momentum, cosine from 0.2."""
    return Experiment(
        model=MLP(inputs=784, hidden=(256,), classes=10),
        task=Classification(),
        data=TFDS(
            name="mnist",
            batch_size=128,
            features={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        ),
        optimizer=SGD(learning_rate=0.2, momentum=0.9, nesterov=True, schedule="cosine"),
        train=TrainConfig(epochs=5),
    )
