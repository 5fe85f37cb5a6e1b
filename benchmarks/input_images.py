"""Training crops per second and core: JPEGs of 500 x 375 to 224 x 224 with flips, beside torchvision.

python benchmarks/input_images.py [--images N] [--rounds N] [--quick]

The images are generated in a temporary directory. The peers need `pip install torch torchvision` of one
release: torchvision's PIL pipeline and its decode_jpeg on tensors, each under a DataLoader with a worker
per core.
Programs take turns; each reads all images once in a round. Images per second and core are images over CPU
seconds, those of workers included, so that other programs count little; images/s is by the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spmd.data import decode, loader
from spmd.data.augment import Flip
from spmd.data.images import Images
from spmd.data.resizing import CentralCrop, Decode, RandomResizedCrop
from spmd.runtime import allocator

BATCH, SIZE = 64, 224
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(folder: Path, num: int) -> None:
    """Images with structure on all scales, as photographs have."""
    for i in range(num):
        rng = np.random.default_rng(i)
        pixels = np.zeros((375, 500, 3))
        for side in (4, 12, 40, 120):
            coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))
            pixels += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) / 4
        pixels = 2 * pixels - 128 + rng.normal(0, 6, pixels.shape)
        place = folder / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)


def ours(folder: Path) -> Callable[[], Iterator[Any]]:
    """Batches of this project."""
    how = (Decode(), RandomResizedCrop(SIZE), Flip())
    config = Images(
        path=str(folder),
        eval_path=str(folder),
        transforms=how,
        eval_transforms=(Decode(), CentralCrop(SIZE)),
        batch_size=BATCH,
    ).found()
    source = config.open("train")

    def batches() -> Iterator[Any]:
        steps = len(source) // BATCH
        transform = config.pipeline("train", source, 0)
        for batch in loader.train_batches(
            source, batch_size=BATCH, seed=0, stop=steps, transform=transform, threads=2
        ):
            yield batch["image"]

    return batches


def peers(folder: Path) -> dict[str, Callable[[], Iterator[Any]]]:
    """Batches of torchvision's two pipelines; none without it."""
    if importlib.util.find_spec("torchvision") is None:
        return {}
    import torch
    from torchvision import datasets, io
    from torchvision.transforms import v2

    moves = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]

    def read(path: str) -> Any:
        return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)

    tensors = datasets.ImageFolder(str(folder), v2.Compose(moves), loader=read)
    pictures = datasets.ImageFolder(str(folder), v2.Compose([*moves, v2.PILToTensor()]))

    def batches(dataset: Any) -> Iterator[Any]:
        options = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
        for images, _ in torch.utils.data.DataLoader(dataset, num_workers=CORES, **options):
            yield images

    return {
        "torchvision, PIL": lambda: batches(pictures),
        "torchvision, decode_jpeg": lambda: batches(tensors),
    }


def measure(batches: Callable[[], Iterator[Any]]) -> tuple[float, float]:
    """(images per CPU second, images per second) of all batches."""
    cpu = lambda: sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    begin, start, seen = cpu(), time.perf_counter(), 0
    for images in batches():
        seen += len(images)
    elapsed = time.perf_counter() - start
    return seen / (cpu() - begin), seen / elapsed


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few images: does it run?")
    args = parser.parse_args()
    num, rounds = (128, 1) if args.quick else (args.images, args.rounds)
    allocator.keep_freed_memory()  # as a run on CPUs does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, num)
        programs = {"spmd": ours(folder), **peers(folder)}
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for turn in range(rounds + 1):
            for program, batches in programs.items():
                figure = measure(batches)
                if turn or args.quick:  # the first round starts threads and warms caches
                    figures[program].append(figure)
    decoder = "simplejpeg" if decode.has_simplejpeg() else "pillow"
    print(f"{CORES} cores, {num} images, median of {rounds} rounds; spmd decodes by {decoder}")
    print(f"{'':>26}  {'images/s/core':>14}  {'images/s':>10}")
    medians = {}
    for program, values in figures.items():
        per_core, by_clock = (statistics.median(column) for column in zip(*values, strict=True))
        medians[program] = per_core
        print(f"{program:>26}  {per_core:>14,.0f}  {by_clock:>10,.0f}")
    if len(medians) > 1:
        best = max(v for program, v in medians.items() if program != "spmd")
        print(f"spmd / faster peer: {medians['spmd'] / best:.2f}")
    else:
        print("spmd / faster peer: pip install -r requirements/peers.txt for the peers")


if __name__ == "__main__":
    main()
