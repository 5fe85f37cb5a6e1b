"""The U-Net of the experiment `brain_unet` in PyTorch: the same split, size, steps and augmentation.

python benchmarks/unet_peers.py [--data DIR] [--seeds N] [--steps N] [--rate R] [--select] [--quick]

DIR holds train/ and eval/, each with image/ and mask/; without it the slices are generated. Prints the Dice
of grey and white matter over all pixels of the evaluation slices, of PyTorch's network for each seed, and
of the best thresholds on the intensity alone. --select trains at three learning rates on four fifths of the
training slices, and prints the Dice on the rest.

The network is that of spmd/models/unet.py layer by layer: padded 3x3 convolutions without bias, batch norm,
ReLU, max-pools of 2, transposed 2x2 convolutions. AdamW, warm-up and cosine are those of the experiment.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:
    import torch
    from torch import nn
except ImportError:  # said by main
    torch = nn = None

WIDTHS, CLASSES = (8, 16, 32), 3
SIZE, PATCH, BATCH, WARMUP = (240, 200), 96, 16, 20  # as in the experiment
RATES = (0.003, 0.01, 0.03)


def read(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(names, images uint8 [N, H, W], masks int64 [N, H, W])."""
    names = sorted(p.name for p in (folder / "image").iterdir())
    image, mask = (
        np.stack([np.asarray(Image.open(folder / kind / n)) for n in names])
        for kind in ("image", "mask")
    )
    return names, image, mask.astype(np.int64)


def padded(image: np.ndarray) -> np.ndarray:
    """Images [N, H, W] between margins of zeros, of a size that halves twice."""
    margins = [(side - n) // 2 for side, n in zip(SIZE, image.shape[1:], strict=True)]
    pads = [(m, s - n - m) for m, s, n in zip(margins, SIZE, image.shape[1:], strict=True)]
    return np.pad(image, [(0, 0), *pads])


def pair(channels: int, features: int) -> Any:
    """Two 3x3 convolutions, each with its norm and ReLU."""
    units = []
    for inputs in (channels, features):
        conv = nn.Conv2d(inputs, features, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        units += [conv, nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
    return nn.Sequential(*units)


def unet() -> Any:
    """The U-Net of the experiment: float32 [B, 1, H, W] -> logits [B, classes, H, W]."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            back = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
            self.down = nn.ModuleList(
                pair(i, o) for i, o in zip((1, *WIDTHS), WIDTHS, strict=False)
            )
            self.widen = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, 2) for low, high in back)
            self.up = nn.ModuleList(pair(2 * high, high) for _, high in back)
            self.head = nn.Conv2d(WIDTHS[0], CLASSES, 1)

        def forward(self, x: Any) -> Any:
            levels = []
            for i, block in enumerate(self.down):
                x = block(nn.functional.max_pool2d(x, 2) if i else x)
                levels.append(x)
            for high, widen, block in zip(levels[-2::-1], self.widen, self.up, strict=True):
                x = block(torch.cat([widen(x), high], 1))
            return self.head(x)

    return UNet()


def patches(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple:
    """A batch cut at random places, as the transform `random_crop` does."""
    limits = np.array(image.shape[1:]) - PATCH + 1
    places = rng.integers(0, limits, (len(image), 2))
    cut = lambda x: np.stack(
        [a[y : y + PATCH, z : z + PATCH] for a, (y, z) in zip(x, places, strict=True)]
    )
    return cut(image), cut(mask)


def train(image: np.ndarray, mask: np.ndarray, *, seed: int, steps: int, rate: float) -> Any:
    """The network after `steps` steps."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = unet()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    cosine = lambda i: (1 + math.cos(math.pi * (i - WARMUP) / max(steps - WARMUP, 1))) / 2
    factor = lambda i: i / WARMUP if i < WARMUP else cosine(i)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    criterion = nn.CrossEntropyLoss()
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:  # epochs follow one another without a gap
            order = np.concatenate([order, rng.permutation(len(image))])
        rows, order = order[:BATCH], order[BATCH:]
        x, y = patches(image[rows], mask[rows], rng)
        loss = criterion(model(as_input(x)), torch.from_numpy(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def as_input(image: np.ndarray) -> Any:
    """uint8 [N, H, W] -> float32 [N, 1, H, W] in [0, 1]."""
    return torch.from_numpy(image.astype(np.float32)[:, None] / 255)


def dice(predicted: np.ndarray, mask: np.ndarray) -> list[float]:
    """2 TP / (2 TP + FP + FN) of grey and white matter, over all pixels."""
    both = [((predicted == c) & (mask == c)).sum() for c in (1, 2)]
    sizes = [(predicted == c).sum() + (mask == c).sum() for c in (1, 2)]
    return [float(2 * b / s) for b, s in zip(both, sizes, strict=True)]


def predict(model: Any, image: np.ndarray) -> np.ndarray:
    """Classes [N, H, W]."""
    model.eval()
    height, width = image.shape[1:]
    top, left = (SIZE[0] - height) // 2, (SIZE[1] - width) // 2
    with torch.no_grad():
        parts = [
            model(as_input(padded(image[i : i + BATCH]))).argmax(1)
            for i in range(0, len(image), BATCH)
        ]
    return torch.cat(parts).numpy()[:, top : top + height, left : left + width]


def by_intensity(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The most frequent class of each intensity of the training slices, uint8 -> class [256]."""
    counts = np.zeros((256, CLASSES), np.int64)
    np.add.at(counts, (image, mask), 1)
    return counts.argmax(1)


def generate(folder: Path) -> None:
    """Slices of noisy disks in rings, 16 to train on and 4 to evaluate on."""
    rng = np.random.default_rng(0)
    distance = np.hypot(*np.meshgrid(np.arange(197) - 98, np.arange(233) - 116))
    for split, num in (("train", 16), ("eval", 4)):
        for kind in ("image", "mask"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(num):
            mask = (distance < 60 + i).astype(np.uint8) + (distance < 30 + i)
            noise = rng.normal(0, 20, mask.shape)
            image = (80 * mask + 40 + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "image" / f"{i}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / split / "mask" / f"{i}.png")


def select(folder: Path, steps: int) -> None:
    """Print the Dice on a fifth of the training slices for each learning rate."""
    names, image, mask = read(folder / "train")
    held = np.array([hashlib.sha256(n.encode()).digest()[0] < 51 for n in names])
    for rate in RATES:
        model = train(image[~held], mask[~held], seed=0, steps=steps, rate=rate)
        grey, white = dice(predict(model, image[held]), mask[held])
        print(f"rate {rate}: Dice on held-out training slices, grey {grey:.4f} white {white:.4f}")


def compare(folder: Path, seeds: int, steps: int, rate: float) -> None:
    """Print intensity alone, a line for each seed, their mean and standard deviation."""
    _, image, mask = read(folder / "train")
    _, eval_image, eval_mask = read(folder / "eval")
    grey, white = dice(by_intensity(image, mask)[eval_image], eval_mask)
    print(f"intensity alone: Dice grey {grey:.4f} white {white:.4f}", flush=True)
    if torch is None:
        print("PyTorch is left out: pip install -r requirements/peers.txt")
        return
    values = []
    for seed in range(seeds):
        start = time.process_time()
        model = train(image, mask, seed=seed, steps=steps, rate=rate)
        values.append(dice(predict(model, eval_image), eval_mask))
        spent = time.process_time() - start
        grey, white = values[-1]
        shown = f"Dice grey {grey:.4f} white {white:.4f} ({spent:.0f} CPU s)"
        print(f"PyTorch, seed {seed}: {shown}", flush=True)
    mean, std = np.mean(values, 0), np.std(values, 0, ddof=min(1, seeds - 1))
    print(
        f"PyTorch, mean of {seeds}: grey {mean[0]:.4f} white {mean[1]:.4f}; standard deviation"
        f" {std[0]:.4f} {std[1]:.4f}"
    )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--select", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps")
    args = parser.parse_args()
    seeds, steps = (1, 3) if args.quick else (args.seeds, args.steps)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            generate(Path(scratch))
        folder = args.data or Path(scratch)
        if args.select:
            select(folder, steps)
        else:
            compare(folder, seeds, steps, args.rate)


if __name__ == "__main__":
    main()
