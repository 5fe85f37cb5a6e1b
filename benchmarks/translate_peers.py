"""Translation side by side: the experiment `translate_help`, the same model in PyTorch; rows per second.

python benchmarks/translate_peers.py [--data-dir DIR] [--rounds N] [--json FILE] [--quick]

DIR holds train.parquet and eval.parquet with columns `en` and `de`; without it the experiment makes its
pairs. Both read packed rows of the same source, so that the ratio is that of tokens per second. The peer's
model and step are in _translator.py, BLEU in translate_scores.py. On the CPU, in turns: see _turns.py.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _turns import ENDLESS, Contestant, Gate, Match, Run, endless, train

if TYPE_CHECKING:
    from spmd.experiment.base import Experiment
    from spmd.optim import AdamW

REPORT, BATCH = 10, 16
# What docs/text.md prints for this data.
PLAIN = "--model.dropout 0 --model.no-scan"
REAL = (
    "--data.source-column en --data.target-column de --data.tokenizer bpe:4000 --model.vocab 4096"
    " --data.source-length 64 --data.target-length 64 --optimizer.warmup-steps 50"
)


def load(data_dir: str, words: list[str]) -> Experiment:
    """`translate_help`, on the pairs of a folder, or on those that it makes."""
    import spmd

    given = [*PLAIN.split()]
    if data_dir:
        files = [str(Path(data_dir) / f"{split}.parquet") for split in ("train", "eval")]
        given += ["--data.files", files[0], "--data.eval-files", files[1], *REAL.split()]
    return spmd.load("translate_help", [*given, *words]).experiment


def load_shared(data_dir: str, scratch: Path, words: list[str]) -> Experiment:
    """The same, with one cache for all contestants."""
    return load(data_dir, [*words, "--data.cache-dir", str(scratch / "cache")])


def ours(gate: Gate, scratch: Path, options: dict) -> None:
    """The experiment through its public door."""
    words = endless(options["run_dir"], REPORT)
    experiment = load_shared(options["data_dir"], scratch, words)
    train(gate, dataclasses.replace(experiment, evaluations=()))


def pytorch(gate: Gate, scratch: Path, options: dict) -> None:
    """The loop of a script: a source, a step, the loss looked at now and then."""
    import torch
    from _translator import Translator, trainer

    torch.manual_seed(0)
    torch.set_num_threads(options["threads"])
    experiment: Any = load_shared(options["data_dir"], scratch, [])
    source, config = experiment.data.open("train"), cast("AdamW", experiment.optimizer)
    model = Translator(experiment.model)
    step = trainer(model, config, experiment.task.label_smoothing, ENDLESS)
    order, rng, losses = np.zeros(0, np.int64), np.random.default_rng(0), []
    for done in range(1, ENDLESS):
        if len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(source))])
        losses.append(step(source.take(order[:BATCH])))
        order = order[BATCH:]
        if done % REPORT == 0:
            float(torch.stack(losses).mean())
            losses.clear()
            gate(done)


def prepare(data_dir: str, scratch: Path) -> None:
    """Print how many tokens of source and target a row has; build the cache that all share."""
    data: Any = load_shared(data_dir, scratch, []).data
    source = data.open("train")
    rows = source.take(np.arange(min(len(source), 2000)))
    used = np.mean(np.concatenate([rows[n] > 0 for n in ("segments", "source_segments")], axis=1))
    room = data.source_length + data.target_length
    print(f"{used * room:.0f} tokens in a row of {room} places: {1 - used:.1%} padding\n")


def one(title: str, run: Run, **options: Any) -> Contestant:
    """A contestant whose rows are counted."""
    return Contestant(
        title=title, run=run, options=options, per_step=BATCH, steps=20, report=REPORT
    )


CONTESTANTS = {
    "ours": one("spmd", ours),
    "torch": one("PyTorch, 2 threads", pytorch, threads=2),
    "torch_one": one("PyTorch, 1 thread", pytorch, threads=1),
}

if __name__ == "__main__":
    Match(
        about=__doc__,
        unit="rows/s",
        contestants=CONTESTANTS,
        ratios=(("ours", "torch", 1.1), ("ours", "torch_one", 1.1)),
        quick=("ours", "torch"),
        prepare=prepare,
        data_dir="a folder with train.parquet and eval.parquet",
    ).main()
