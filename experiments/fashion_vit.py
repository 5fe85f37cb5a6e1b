"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) by a small vision transformer (Dosovitskiy et al. 2020).

python run.py --experiment fashion_vit --data.path DIR

DIR holds the four files of the set, train-images-idx3-ubyte.gz and so on
(github.com/zalandoresearch/fashion-mnist). Patches of 4 x 4 pixels, four blocks of width 64: a network that
has to learn from 60,000 images what convolutions know.
It has not been run to its end; expect less than the convolutions reach.
"""

from spmd import Experiment
from spmd.data.augment import Crop, Flip
from spmd.data.idx import Idx
from spmd.models.vit import ViT
from spmd.optim import AdamW
from spmd.tasks import Classification
from spmd.train import LogConfig, TrainConfig


def config() -> Experiment:
    """Patches of 4 x 4 pixels, 49 of them; 4 blocks of width 64."""
    return Experiment(
        model=ViT(
            image=28, patch=4, channels=1, layers=4, embed=64, heads=4, pool="mean", classes=10
        ),
        task=Classification(),
        data=Idx(batch_size=128, eval_batch_size=500, transforms=(Crop(2), Flip())),
        optimizer=AdamW(learning_rate=0.002, warmup_steps=200),
        train=TrainConfig(epochs=5),
        log=LogConfig(pictures=16),
    )
