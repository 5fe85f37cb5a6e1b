"""ResNet-50 on ImageNet-1k as Goyal et al. 2017 train it (arXiv 1706.02677).

python run.py --experiment imagenet_resnet50 --data.dir DIR
python run.py --experiment imagenet_resnet50 --data folder --data.path DIR

The first reads the TFDS set imagenet2012, which `run.py data prepare` makes of the archives of image-net.org
(150 GB); the second a folder with `train` and `val`, a folder for each class in them (--model.classes 0 takes
their number from it). Cost: 90 epochs, 112,590 steps of 1,024 images; estimates of `run.py plan` for v5e:4x4
and h100:8 are in docs/plan.md. Expect 76.3 % (Goyal et al., table 1: an error of 23.6 % with 256 images a
step, 23.7 % with 8,192). It was not run to its end here. There, each GPU normalises its own 32 images; here
batch norm takes the global batch.

Another batch size scales the rate by itself; warm up for 5 epochs: --data.batch-size 8192
--optimizer.warmup-steps 782.
"""

from spmd import Experiment
from spmd.data.augment import Flip
from spmd.data.color import Normalize
from spmd.data.imagenet import Kind, imagenet
from spmd.data.resizing import CentralCrop, Decode, RandomResizedCrop
from spmd.models.resnet import ResNet
from spmd.optim import SGD
from spmd.tasks import Classification
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

TRAIN = (Decode(), RandomResizedCrop(224), Flip(), Normalize())
EVAL = (Decode(), CentralCrop(224), Normalize())


def config(data: Kind = "tfds") -> Experiment:
    """25,557,032 parameters; the last scale of each block is zero at first, norms and biases do not decay."""
    return Experiment(
        model=ResNet(depth=50, classes=1000, dtype="bfloat16"),
        task=Classification(),
        data=imagenet(data, TRAIN, EVAL),
        optimizer=SGD(
            learning_rate=0.1,
            base_batch_size=256,
            warmup_steps=6255,
            schedule="step",
            drops=(30 / 90, 60 / 90, 80 / 90),
            # 1e-4 as part of the gradient, which a momentum of 0.9 sums ten times; here it is beside it.
            weight_decay=1e-3,
        ),
        train=TrainConfig(epochs=90),
        eval=EvalConfig(every=5000),
        checkpoint=CheckpointConfig(every=5000),
    )
