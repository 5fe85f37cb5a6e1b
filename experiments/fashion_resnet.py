"""Fashion-MNIST by a ResNet-20. (draft)"""

from spmd import Experiment
from spmd.data.augment import Crop, Flip
from spmd.data.erasing import RandomErasing
from spmd.data.idx import Idx
from spmd.models.resnet import ResNet
from spmd.optim import SGD
from spmd.tasks import Classification
from spmd.train import TrainConfig


def config() -> Experiment:
    """Nesterov momentum, cosine."""
    return Experiment(
        model=ResNet(depth=20, channels=1, classes=10),
        task=Classification(),
        data=Idx(
            batch_size=128,
            eval_batch_size=500,
            transforms=(Crop(2), Flip(), RandomErasing(0.5)),
        ),
        optimizer=SGD(learning_rate=0.1, weight_decay=0.005, warmup_steps=400),
        train=TrainConfig(epochs=10),
    )
