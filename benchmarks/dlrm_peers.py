"""A recommender side by side: this project's loop on sparse tables, a DLRM in PyTorch; examples per second.

python benchmarks/dlrm_peers.py [--rounds N] [--json FILE] [--quick]        # 4 minutes

The experiment `clicks` (26 categories, rows of 16, batches of 1,024) on a log that all contestants hold in
memory. The peer is DLRM as its authors wrote it (dlrm_s_pytorch.py): an nn.EmbeddingBag with sparse gradients
for each category, and Adagrad for them; also with one nn.EmbeddingBag of all categories, which saves calls.
Adam for the other parameters. Where others use the cores, PyTorch's threads wait for each other: it also runs
with one. On the CPU, in turns: see _turns.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, endless, train

EXAMPLES, BATCH = 200_000, 1024
REPORT = 50
WIDTH, BOTTOM, TOP = 16, (64,), (64, 32)  # of `clicks`


def write_log(data_dir: str, scratch: Path) -> None:
    """numbers.npy [N, 13], label.npy [N], ids.npy [N, 26] and sizes.npy [26] of the generated log."""
    from spmd.data.clicks import Clicks

    config = Clicks(examples=EXAMPLES, batch_size=BATCH)
    log = config.open("train").take(np.arange(EXAMPLES))
    categories = sorted(name for name in log if name.startswith("category"))
    arrays = {name: np.asarray(log[name]) for name in ("numbers", "label")}
    arrays |= {
        "ids": np.stack([log[name] for name in categories], 1),
        "sizes": np.array(config.ids),
    }
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)


def ours(gate: Gate, scratch: Path, options: dict) -> None:
    """The experiment through its public door."""
    import spmd
    from spmd.data import Arrays

    words = [*options["words"], *endless(options["run_dir"], REPORT)]
    experiment = spmd.load("clicks", words).experiment

    def log() -> dict[str, np.ndarray]:
        ids = np.load(scratch / "ids.npy")
        columns = {f"category_{i:02}": ids[:, i].copy() for i in range(ids.shape[1])}
        return columns | {name: np.load(scratch / f"{name}.npy") for name in ("numbers", "label")}

    features = dict(experiment.data.features)
    arrays = Arrays(train=log, eval=log, features=features, batch_size=BATCH)
    train(gate, dataclasses.replace(experiment, data=arrays))


def pytorch(gate: Gate, scratch: Path, options: dict) -> None:
    """DLRM (github.com/facebookresearch/dlrm, dlrm_s_pytorch.py) and a loop around it."""
    import torch
    from torch import nn

    torch.set_num_threads(options["threads"] or os.cpu_count() or 1)
    torch.manual_seed(0)
    numbers, label, ids, sizes = (
        torch.from_numpy(np.load(scratch / f"{name}.npy"))
        for name in ("numbers", "label", "ids", "sizes")
    )
    ids, label, num = ids.long(), label.float(), len(sizes)
    offset = torch.zeros(num, dtype=torch.long)
    if options["stacked"]:  # one table; a bag of one id for each category of an example
        offset[1:] = sizes.cumsum(0)[:-1]
        tables = nn.ModuleList([nn.EmbeddingBag(int(sizes.sum()), WIDTH, mode="sum", sparse=True)])
    else:
        tables = nn.ModuleList(
            nn.EmbeddingBag(int(size), WIDTH, mode="sum", sparse=True) for size in sizes
        )

    def layers(widths: tuple[int, ...], last: bool) -> nn.Sequential:
        parts: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            parts.append(nn.Linear(a, b))
            if last or i + 2 < len(widths):
                parts.append(nn.ReLU())
        return nn.Sequential(*parts)

    pairs = num * (num + 1) // 2
    bottom = layers((numbers.shape[1], *BOTTOM, WIDTH), last=True)
    top = layers((WIDTH + pairs, *TOP, 1), last=False)
    first, second = torch.tril_indices(num + 1, num + 1, -1)
    bag = torch.arange(BATCH)  # where each bag starts: of one id each
    bags = torch.arange(BATCH * num)
    rows = torch.optim.Adagrad(tables.parameters(), lr=0.1)
    dense = torch.optim.Adam([*bottom.parameters(), *top.parameters()], lr=5e-3)
    criterion = nn.BCEWithLogitsLoss()
    done = 0
    for _ in range(ENDLESS):
        order = torch.randperm(len(label))
        for at in range(0, len(label) - BATCH + 1, BATCH):
            chosen = order[at : at + BATCH]
            x, y, i = numbers[chosen], label[chosen], ids[chosen]
            d = bottom(x)
            if options["stacked"]:
                embedded = tables[0]((i + offset).reshape(-1), bags).reshape(BATCH, num, WIDTH)
                vectors = torch.cat([d[:, None], embedded], 1)
            else:
                looked_up = [table(i[:, c].contiguous(), bag) for c, table in enumerate(tables)]
                vectors = torch.stack([d, *looked_up], 1)
            product = torch.bmm(vectors, vectors.transpose(1, 2))
            logits = top(torch.cat([d, product[:, first, second]], 1))[:, 0]
            rows.zero_grad()
            dense.zero_grad()
            criterion(logits, y).backward()
            rows.step()
            dense.step()
            done += 1
            if done % REPORT == 0:
                gate(done)


def _ours(title: str, words: list[str]) -> Contestant:
    return Contestant(
        title=f"spmd, {title}", run=ours, options={"words": words}, per_step=BATCH, steps=200
    )


def _torch(title: str, *, threads: int = 0, stacked: bool = False) -> Contestant:
    return Contestant(
        title=f"PyTorch, {title}",
        run=pytorch,
        options={"threads": threads, "stacked": stacked},
        per_step=BATCH,
        steps=100,
    )


CONTESTANTS = {
    "ours": _ours("one device", []),
    "torch": _torch("an EmbeddingBag for each category"),
    "torch_one": _torch("the same, one thread", threads=1),
    "torch_stacked": _torch("one EmbeddingBag, one thread", threads=1, stacked=True),
    "ours_rows": _ours("one device, no replicated tables", ["--model.placement", "rows"]),
}
RATIOS = (
    ("ours", "torch", 1.5),
    ("ours", "torch_one", 1.5),
    ("ours", "torch_stacked", None),
    ("ours_rows", "torch_one", None),
)


if __name__ == "__main__":
    Match(
        about=__doc__,
        unit="examples/s",
        contestants=CONTESTANTS,
        ratios=RATIOS,
        quick=("ours", "torch_one"),
        prepare=write_log,
        data_dir="",
    ).main()
