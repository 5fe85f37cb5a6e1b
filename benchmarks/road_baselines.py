"""Baselines on the rendered roads: colours for `road_segmentation`, ridge regression for `road_steering`.

python benchmarks/road_baselines.py [--data DIR] [--quick]

DIR holds train/ and eval/, each with image/, mask/ and actions.csv (frame, track, steer); without it the
scenes are generated. Numpy only. The classifier gives each colour (of 32 x 32 x 32) its most frequent class
on the training frames; its error on colours that they lack is that of the most frequent class. The ridge
regression sees all pixels; its penalty is chosen by leaving out each training track in turn.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
BLOCKS = (1, 2, 4, 8)  # sides of the blocks of pixels that are averaged before
CLASSES = 4


class Frames(NamedTuple):
    """image uint8 [N, H, W, 3], mask [N, H, W], steer float64 [N], track [N]."""

    image: np.ndarray
    mask: np.ndarray
    steer: np.ndarray
    track: np.ndarray


def read(folder: Path) -> Frames:
    """The frames of a split."""
    with open(folder / "actions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    image, mask = (
        np.stack([np.asarray(Image.open(folder / kind / f"{r['frame']}.png")) for r in rows])
        for kind in ("image", "mask")
    )
    steer = np.array([float(r["steer"]) for r in rows])
    return Frames(image, mask, steer, np.array([int(r["track"]) for r in rows]))


def colours(image: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 -> number of the colour, 0 to 32767."""
    r, g, b = np.moveaxis(image.astype(np.int64) >> 3, -1, 0)
    return (r * 32 + g) * 32 + b


def mean_iou(predicted: np.ndarray, mask: np.ndarray) -> float:
    """Mean over the classes of TP / (TP + FP + FN), all pixels together."""
    cell = mask.astype(np.int64) * CLASSES + predicted
    matrix = np.bincount(cell.reshape(-1), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return float((np.diag(matrix)[union > 0] / union[union > 0]).mean())


def by_colour(train: Frames, other: Frames) -> float:
    """mIoU of the most frequent class of each colour."""
    cell = colours(train.image) * CLASSES + train.mask
    counts = np.bincount(cell.reshape(-1), minlength=32**3 * CLASSES).reshape(-1, CLASSES)
    classes = np.where(counts.sum(1) > 0, counts.argmax(1), counts.sum(0).argmax())
    return mean_iou(classes[colours(other.image)], other.mask)


def averaged(image: np.ndarray, block: int) -> np.ndarray:
    """Means over blocks of pixels, as rows: [N, H, W, 3] -> float64 [N, D] in [0, 1]."""
    num, height, width, channels = image.shape
    shape = (num, height // block, block, width // block, block, channels)
    return (image.reshape(shape).mean((2, 4)) / 255).reshape(num, -1)


def ridge(x: np.ndarray, y: np.ndarray, other: np.ndarray, penalty: float) -> np.ndarray:
    """Predictions [M] for rows `other` [M, D] from rows x [N, D] and numbers y [N], by the dual form."""
    centre = x.mean(0)
    x, other = x - centre, other - centre
    weights = np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y - y.mean())
    return other @ (x.T @ weights) + y.mean()


def rmse(error: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.square(error).mean()))


def left_out(x: np.ndarray, frames: Frames, penalty: float) -> float:
    """RMSE over the training frames, each track predicted from the others."""
    error = np.empty(len(x))
    for track in np.unique(frames.track):
        out = frames.track == track
        error[out] = ridge(x[~out], frames.steer[~out], x[out], penalty) - frames.steer[out]
    return rmse(error)


def generate(folder: Path) -> None:
    """Scenes of a grey road on green, which bends as the driver steers."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:96, 0:96]
    for split, num in (("train", 24), ("eval", 8)):
        for kind in ("image", "mask"):
            (folder / split / kind).mkdir(parents=True)
        rows = ["frame,track,steer"]
        for i in range(num):
            steer = float(rng.uniform(-1, 1))
            road = np.abs(x - 48 - steer * (96 - y) ** 2 / 200) < 12
            image = np.where(road[..., None], (100, 100, 100), (100, 200, 100))
            image = (image + rng.integers(-9, 9, image.shape)).astype(np.uint8)
            Image.fromarray(image).save(folder / split / "image" / f"{i:04}.png")
            mask = np.where(road, 1, 2).astype(np.uint8)
            Image.fromarray(mask).save(folder / split / "mask" / f"{i:04}.png")
            rows.append(f"{i:04},{i % 3},{steer:.4f}")
        (folder / split / "actions.csv").write_text("\n".join(rows) + "\n")


def main() -> None:
    """Print mIoU of the colours, RMSE of a constant and of the ridge regression."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true", help="one penalty on blocks of 8 pixels")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            generate(Path(scratch))
        train, other = (read((args.data or Path(scratch)) / split) for split in ("train", "eval"))
    print(f"mIoU by colour alone: {by_colour(train, other):.4f}")
    print(f"RMSE of a constant: {rmse(train.steer.mean() - other.steer):.4f}", flush=True)
    best = (float("inf"), 0, 0.0)
    for block in BLOCKS[-1:] if args.quick else BLOCKS:
        x = averaged(train.image, block)
        for penalty in PENALTIES[:1] if args.quick else PENALTIES:
            best = min(best, (left_out(x, train, penalty), block, penalty))
    error, block, penalty = best
    x, others = averaged(train.image, block), averaged(other.image, block)
    found = rmse(ridge(x, train.steer, others, penalty) - other.steer)
    print(
        f"RMSE of ridge regression: {found:.4f} (penalty {penalty:g}, blocks of {block} pixels, chosen by"
        f" {error:.4f} on training tracks left out)"
    )


if __name__ == "__main__":
    main()
