"""Road, grass and car in rendered scenes, by a U-Net (Ronneberger et al. 2015, arXiv 1505.04597).

python run.py --experiment road_segmentation --data.path DIR    # 2 minutes of a CPU core; expect mIoU 0.99

DIR holds train/ and eval/, each with image/NAME.png (96 x 96) and mask/NAME.png: 0 other, 1 road, 2 grass,
3 car. The figures in docs/results.md are of scenes that gymnasium's CarRacing-v3 draws: synthetic, 600
frames of 6 tracks to train on and 150 of 3 other tracks. benchmarks/road_baselines.py tells classes by
colour alone.
"""

from spmd import Experiment
from spmd.data.augment import Flip
from spmd.data.images import Images
from spmd.data.resizing import Decode, Resize
from spmd.models.unet import UNet
from spmd.optim import AdamW
from spmd.tasks import Segmentation
from spmd.train import CheckpointConfig, EvalConfig, LogConfig, TrainConfig

PAIR = ("image", "mask")


def config() -> Experiment:
    """96 x 96 pixels; mirrored scenes."""
    decoded = (Decode(), Resize(96, images=PAIR))
    return Experiment(
        model=UNet(channels=3, widths=(8, 16, 32), classes=4),
        task=Segmentation(dice=1.0, class_names=("other", "road", "grass", "car")),
        data=Images(
            target="mask",
            batch_size=16,
            eval_batch_size=48,
            transforms=(*decoded, Flip(PAIR)),
            eval_transforms=decoded,
        ),
        optimizer=AdamW(learning_rate=0.01, warmup_steps=20),
        train=TrainConfig(epochs=8),
        eval=EvalConfig(every=100),
        checkpoint=CheckpointConfig(best="eval/miou"),
        log=LogConfig(pictures=8),
    )
