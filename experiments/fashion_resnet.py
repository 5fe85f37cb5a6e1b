"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) by a ResNet-20 (He et al. 2015, arXiv 1512.03385).

python run.py --experiment fashion_resnet --data.path DIR    # 40 to 60 minutes of a CPU core
python run.py --experiment fashion_resnet --model wrn28_10 --data.path DIR    # for a GPU; not run here

DIR holds the four files of the set, train-images-idx3-ubyte.gz and so on
(github.com/zalandoresearch/fashion-mnist). Muon (Jordan et al. 2024) and no random erasing, since the run is
short; neither choice has been compared.
`--data.train-split 'train[:55000]' --data.eval-split 'train[55000:]'`
is the split on which settings are to be chosen.

Expect 94.2 % of the 10,000 test images (seed 0).

wrn28_10 is the recipe of Zhong et al. 2017 (Random Erasing Data Augmentation, arXiv 1708.04896), who report
96.3 %: WRN-28-10, 300 epochs, batch 128, rate 0.1 divided by ten after 150 and 225, padded crops, flips,
random erasing. Their L2 penalty of 0.0005 is a decoupled decay of 0.005: momentum 0.9 sums ten gradients.
"""

from typing import Literal

from spmd import Experiment
from spmd.data.augment import Crop, Flip
from spmd.data.erasing import RandomErasing
from spmd.data.idx import Idx
from spmd.models.resnet import ResNet
from spmd.models.wide_resnet import WideResNet
from spmd.optim import SGD, Muon
from spmd.tasks import Classification
from spmd.train import LogConfig, TrainConfig


def config(model: Literal["resnet20", "wrn28_10"] = "resnet20") -> Experiment:
    """A ResNet-20 for the CPU, or the published wide network."""
    small = model == "resnet20"
    brief = (Crop(2), Flip())
    return Experiment(
        model=ResNet(depth=20, channels=1) if small else WideResNet(channels=1, depth=28, widen=10),
        task=Classification(),
        data=Idx(
            batch_size=128,
            eval_batch_size=500,
            transforms=brief if small else (Crop(4), Flip(), RandomErasing(0.5)),
        ),
        optimizer=Muon(learning_rate=0.01, weight_decay=0.05, warmup_steps=100)
        if small
        else SGD(learning_rate=0.1, schedule="step", drops=(0.5, 0.75), weight_decay=0.005),
        train=TrainConfig(epochs=8 if small else 300),
        log=LogConfig(pictures=16),
    )
