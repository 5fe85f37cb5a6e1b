"""Your own images, a folder for each class.

python run.py --experiment image_folder --data.path DIR
python run.py --experiment image_folder --data.path DIR --model vit_b16 --init.from VIT --init.skip "head/*"
python run.py predict --experiment image_folder --data.path OTHER --out predictions.jsonl

DIR holds a folder of images for each class, or `train` and `eval` with such folders, or is an index (.csv,
.jsonl, .parquet) with the columns image and label. The classes are kept in the run. The models, each with its
resolution and optimizer, and what an image costs in an epoch on a CPU core:

    cnn       64 x 64 pixels, three convolutions               3 ms
    resnet    128 x 128, ResNet-18                           0.1 s
    vit       128 x 128, Ti/16; learns slower than the others from few images    0.1 s
    resnet50  224 x 224, as microsoft/resnet-50                1 s, for --init.from
    vit_b16   224 x 224, as google/vit-base-patch16-224        3 s, for --init.from
"""

from typing import Literal

from spmd import Experiment
from spmd.data.augment import Flip
from spmd.data.color import Normalize
from spmd.data.images import Images
from spmd.data.resizing import CentralCrop, Decode, RandomResizedCrop
from spmd.models.cnn import CNN
from spmd.models.resnet import ResNet
from spmd.models.vit import ViT
from spmd.optim import AdamW
from spmd.tasks import Classification
from spmd.train import LogConfig, TrainConfig

MODELS = {
    "cnn": CNN(channels=3, features=(16, 32, 64), classes=0),
    "resnet": ResNet(depth=18, classes=0),
    "vit": ViT(image=128, embed=192, heads=3, classes=0),
    "resnet50": ResNet(depth=50, classes=0),
    "vit_b16": ViT(embed=768, heads=12, classes=0, norm_epsilon=1e-12),
}
PIXELS = {"cnn": 64, "resnet": 128, "vit": 128, "resnet50": 224, "vit_b16": 224}
RATES = {"cnn": 2e-3, "resnet": 1e-3, "vit": 5e-4, "resnet50": 2e-4, "vit_b16": 3e-5}
# Weights from elsewhere expect images as they were trained.
NORMALIZE = {"resnet50": (Normalize(),), "vit_b16": (Normalize(mean=(0.5,), std=(0.5,)),)}


def config(
    model: Literal["cnn", "resnet", "vit", "resnet50", "vit_b16"] = "cnn",
) -> Experiment:
    """Random crops and flips; the central crop in evaluation."""
    pixels, normalize = PIXELS[model], NORMALIZE.get(model, ())
    return Experiment(
        model=MODELS[model],
        task=Classification(),
        data=Images(
            batch_size=64,
            eval_batch_size=256,
            transforms=(Decode(), RandomResizedCrop(pixels, 0.35), Flip(), *normalize),
            eval_transforms=(Decode(), CentralCrop(pixels, 1.0), *normalize),
        ),
        optimizer=AdamW(learning_rate=RATES[model]),
        train=TrainConfig(epochs=10),
        log=LogConfig(pictures=16),
    )
