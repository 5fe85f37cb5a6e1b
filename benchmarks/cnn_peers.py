"""A small convolutional network on the CPU: this project's loop beside PyTorch; images per second.

python benchmarks/cnn_peers.py [--rounds N] [--json FILE] [--quick]

Two 3x3 convolutions of 32 and 64 channels, each with batch norm, ReLU and a 2x2 max-pool, then the mean over
pixels and 10 logits; 28 x 28 images, uint8 in memory, a batch of 128, SGD with momentum. PyTorch takes its
batches by one index operation and not through a DataLoader, whose work per example would count too; once with
its default layout and once with channels last. All train in turns, on the same cores: see _turns.py.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, endless, train

FEATURES = {"image": ((28, 28, 1), "uint8"), "label": ((), "int32")}
EXAMPLES, BATCH, REPORT = 12_800, 128, 5


def ours(gate: Gate, data: Path, options: dict) -> None:
    """The model `CNN` as an experiment."""
    from spmd import Experiment
    from spmd.data import Arrays
    from spmd.experiment import overrides
    from spmd.models.cnn import CNN
    from spmd.optim import SGD
    from spmd.tasks import Classification

    arrays = lambda: {name: np.load(data / f"{name}.npy") for name in FEATURES}
    experiment = Experiment(
        model=CNN(features=(32, 64)),
        task=Classification(),
        data=Arrays(batch_size=BATCH, features=FEATURES, train=arrays, eval=arrays),
        optimizer=SGD(learning_rate=0.01, momentum=0.9),
    )
    train(gate, overrides.override(experiment, endless(options["run_dir"], REPORT))[0])


def pytorch(gate: Gate, data: Path, options: dict) -> None:
    """A plain training loop."""
    import torch
    from torch import nn

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores or 1)
    torch.manual_seed(0)
    block = lambda i, o: [
        nn.Conv2d(i, o, 3, padding=1, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*block(1, 32), *block(32, 64), *head)
    model = model.to(memory_format=options["layout"](torch))
    image, label = (torch.from_numpy(np.load(data / f"{name}.npy")) for name in FEATURES)
    image, label = image.permute(0, 3, 1, 2), label.long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    criterion = nn.CrossEntropyLoss()
    for step in itertools.count(1):
        start = (step - 1) * BATCH % len(label)
        if not start:
            order = torch.randperm(len(label))
        rows = order[start : start + BATCH]
        batch = image[rows].float().div_(255).to(memory_format=options["layout"](torch))
        optimizer.zero_grad()
        criterion(model(batch), label[rows]).backward()
        optimizer.step()
        if step % REPORT == 0:
            gate(step)
        if step >= ENDLESS:
            return


def write_data(data_dir: str, scratch: Path) -> None:
    """image.npy and label.npy: noise, which takes as long as digits do."""
    del data_dir
    rng = np.random.default_rng(0)
    np.save(scratch / "image.npy", rng.integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8))
    np.save(scratch / "label.npy", rng.integers(0, 10, EXAMPLES, dtype=np.int32))


def _contestant(title: str, run, **options) -> Contestant:
    return Contestant(
        title=title, run=run, options=options, per_step=BATCH, steps=20, report=REPORT
    )


CONTESTANTS = {
    "torch_last": _contestant(
        "PyTorch, channels last", pytorch, layout=lambda torch: torch.channels_last
    ),
    "ours": _contestant("spmd, one device", ours),
    "torch": _contestant(
        "PyTorch, its default layout", pytorch, layout=lambda torch: torch.contiguous_format
    ),
}

# Figures: to reach on two cores.
RATIOS = (("ours", "torch_last", 1.0), ("ours", "torch", 1.0))


if __name__ == "__main__":
    Match(
        about=__doc__,
        unit="images/s",
        contestants=CONTESTANTS,
        ratios=RATIOS,
        quick=("ours", "torch"),
        prepare=write_data,
        data_dir="unused: the data is generated",
    ).main()
