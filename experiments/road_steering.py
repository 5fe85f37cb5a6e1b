"""The steering of a driver from what is seen, by a small PilotNet (Bojarski et al. 2016, arXiv 1604.07316).

python run.py --experiment road_steering --data.path DIR/train/actions.csv \\
    --data.eval-path DIR/eval/actions.csv

actions.csv has the columns frame, track and steer (-1 is left, 1 right); the images are image/FRAME.png
beside it. Cost: about 1 minute of a CPU core; expect RMSE 0.10. The figures in docs/results.md are of a
scripted driver in gymnasium's CarRacing-v3: synthetic, 600 frames of 6 tracks to train on and 150 of 3
other tracks. benchmarks/road_baselines.py has a constant and a ridge regression on the pixels.
`--data.group-by track` without an evaluation path keeps a track on one side.
"""

# B batch, H height, W width, C channels

import dataclasses

import jax
from flax import nnx

from spmd import Experiment
from spmd.data.images import Images
from spmd.data.resizing import Decode, Resize
from spmd.models.layers import ConvConfig, ConvNorm, Dense
from spmd.models.layers.initial import zeros
from spmd.optim import AdamW
from spmd.tasks import Regression
from spmd.train import CheckpointConfig, LogConfig, TrainConfig

SCALE = 0.05  # of the linear path, whose many inputs would otherwise move it too fast


@dataclasses.dataclass(frozen=True, kw_only=True)
class PilotNet(ConvConfig):
    """Convolutions of stride 2 and a hidden layer, beside a linear path (Cheng et al. 2016, Wide & Deep)."""

    widths: tuple[int, ...] = (16, 24, 32, 48)
    """Channels of each level; the image halves at each."""
    hidden: int = 64
    """Width of the hidden layer."""
    image: int = 96
    """Height and width of the images."""
    block: int = 4
    """Side of the blocks of pixels whose means the linear path sees."""

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
        self.block = config.block
        means = config.channels * (config.image // config.block) ** 2
        self.direct = Dense(rngs, (means, config.classes), ("input", "classes"), init=zeros)
        self.head = Dense(rngs, (config.hidden, config.classes), ("mlp", "classes"))

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> numbers [B, classes]."""
        batch, height, width, _ = x_BHWC.shape
        side = self.block
        blocks = x_BHWC.reshape(batch, height // side, side, width // side, side, -1)
        direct = SCALE * self.direct(blocks.mean((2, 4)).reshape(batch, -1))
        for conv in self.convs:
            x_BHWC = jax.nn.relu(conv(x_BHWC))
        return direct + self.head(jax.nn.relu(self.hidden(x_BHWC.reshape(batch, -1))))


def config() -> Experiment:
    """96 x 96 pixels. Mirrored scenes would contradict their dials, one of which shows the wheel."""
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
            transforms=decoded,
            eval_transforms=decoded,
        ),
        optimizer=AdamW(learning_rate=0.003, warmup_steps=20),
        train=TrainConfig(epochs=40),
        checkpoint=CheckpointConfig(best="eval/rmse", best_is="lowest"),
        log=LogConfig(pictures=16),
    )
