"""The steering of a driver from what is seen, by a small PilotNet (Bojarski et al. 2016, arXiv 1604.07316).

python run.py --experiment road_steering --data.path DIR/train/actions.csv \\
    --data.eval-path DIR/eval/actions.csv

actions.csv has the columns frame, track and steer (-1 is left, 1 right); the images are image/FRAME.png
beside it. Cost: about 1 minute of a CPU core. The figures in docs/results.md are of a scripted driver in
gymnasium's CarRacing-v3: synthetic, 600 frames of 6 tracks to train on and 150 of 3 other tracks.
benchmarks/road_baselines.py has a constant and a ridge regression on the pixels. `--data.group-by track`
without an evaluation path keeps a track on one side.
"""

# B batch, H height, W width, C channels, D features

import dataclasses

import jax
import numpy as np
from flax import nnx

from spmd import Experiment
from spmd.data.images import Images
from spmd.data.resizing import Decode, Resize
from spmd.data.transform import Transform
from spmd.models.layers import ConvConfig, ConvNorm, Dense, Dropout
from spmd.optim import AdamW
from spmd.tasks import Regression
from spmd.train import CheckpointConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PilotNet(ConvConfig):
    """Convolutions of stride 2, then a hidden layer, which sees where on the image something is."""

    widths: tuple[int, ...] = (16, 24, 32, 48)
    """Channels of each level; the image halves at each."""
    hidden: int = 64
    """Width of the hidden layer."""
    image: int = 96
    """Height and width of the images."""
    dropout: float = 0.0
    """Dropout rate before and after the hidden layer."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with initial weights."""
        return PilotNetModule(self, rngs)


class PilotNetModule(nnx.Module):
    """The network of a PilotNet."""

    def __init__(self, config: PilotNet, rngs: nnx.Rngs):
        inputs = (config.channels, *config.widths)
        self.convs = nnx.List(
            [
                ConvNorm(config, rngs, 5 if i < 2 else 3, inputs[i], width, stride=2)
                for i, width in enumerate(config.widths)
            ]
        )
        pixels = (config.image // 2 ** len(config.widths)) ** 2
        self.hidden = Dense(rngs, (pixels * config.widths[-1], config.hidden), ("input", "mlp"))
        self.dropouts = nnx.List([Dropout(config.dropout), Dropout(config.dropout)])
        self.head = Dense(rngs, (config.hidden, config.classes), ("mlp", "classes"))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> numbers [B, classes]."""
        for conv in self.convs:
            x_BHWC = jax.nn.relu(conv(x_BHWC))
        x_BD = self.dropouts[0](x_BHWC.reshape(len(x_BHWC), -1))
        return self.head(self.dropouts[1](jax.nn.relu(self.hidden(x_BD))))


@dataclasses.dataclass(frozen=True)
class Mirror(Transform):
    """Mirrors half of the images; where left is right, the steering is the opposite."""

    def features(self, features):
        """The same."""
        return features

    def __call__(self, batch, draws):
        """The batch with half of the examples mirrored."""
        mirrored_N = draws.uniform() < 0.5
        sign_N = np.where(mirrored_N, -1, 1).astype(np.float32)
        image = np.where(
            mirrored_N[:, None, None, None], batch["image"][:, :, ::-1], batch["image"]
        )
        return {**batch, "image": image, "steer": batch["steer"] * sign_N}


def config() -> Experiment:
    """96 x 96 pixels; mirrored scenes."""
    decoded = (Decode(), Resize(96))
    return Experiment(
        model=PilotNet(classes=1),
        task=Regression(target="steer"),
        data=Images(
            target="columns",
            columns=("steer",),
            image_column="frame",
            image_pattern="image/{}.png",
            group_by="track",
            batch_size=48,
            eval_batch_size=152,
            transforms=(*decoded, Mirror()),
            eval_transforms=decoded,
        ),
        optimizer=AdamW(learning_rate=0.003, warmup_steps=20),
        train=TrainConfig(epochs=60),
        checkpoint=CheckpointConfig(best="eval/rmse", best_is="lowest"),
    )
