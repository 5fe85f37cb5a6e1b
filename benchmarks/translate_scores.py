"""BLEU and chrF of `translate_help` and of the same model in PyTorch, on a test split; mean of seeds.

python benchmarks/translate_scores.py [--data-dir DIR] [--seeds N] [--steps N] [--rates R R] [--only ours]
python benchmarks/translate_scores.py --data-dir DIR --select      # a run at each of three rates

DIR holds train.parquet, eval.parquet and test.parquet with columns `en` and `de`; without it the experiment
makes its pairs. Same sizes, packed rows, tokenizer, steps, AdamW, warm-up, cosine and smoothed loss; both
decode greedily, at most 50 tokens more than the source has. A learning rate is chosen by the BLEU of the
evaluation split: --select prints it, and never reads the test split. Beside them stands the source itself,
copied. Needs sacrebleu; the peer needs PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from translate_peers import BATCH, load

from spmd.data.text.pairs import Pairs
from spmd.train.translate import Decoding
from spmd.train.translation import score, translate_texts

RATES = (0.001, 0.003, 0.006)
CHOSEN = (0.003, 0.003)  # ours, PyTorch
EXTRA = 50


class Texts:
    """The pairs of a split. data: its own Pairs, whose tokenizer is that of training."""

    def __init__(self, data: Pairs, folder: str, split: str):
        if folder and split == "test":
            file = str(Path(folder) / "test.parquet")
            data = dataclasses.replace(data, eval_files=(file,))
        pairs = list(data.pairs("eval"))
        self.sources = [source for source, _ in pairs]
        self.targets = [target for _, target in pairs]


def train_ours(experiment: Any, scratch: Path, texts: Texts) -> list[str]:
    """Translations of a run of the experiment."""
    from spmd.api import Handle

    directory = str(scratch / f"ours-{time.monotonic_ns()}")
    experiment = dataclasses.replace(
        experiment,
        evaluations=(),
        run=dataclasses.replace(experiment.run, dir=directory),
    )
    handle = Handle(experiment)
    handle.train()
    decoding = Decoding(search=None, extra=EXTRA)
    return translate_texts(handle.restore(), experiment.data, texts.sources, decoding)


def batches(source: Any, seed: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a source, shuffled anew each epoch; epochs follow one another without a gap."""
    order, rng = np.zeros(0, np.int64), np.random.default_rng(seed)
    for _ in range(steps):
        if len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(source))])
        yield source.take(order[:BATCH])
        order = order[BATCH:]


def train_torch(experiment: Any, scratch: Path, texts: Texts) -> list[str]:
    """Translations of PyTorch's model."""
    import torch
    from _translator import Translator, trainer, translate

    del scratch
    torch.manual_seed(experiment.seed)
    model, steps = Translator(experiment.model), experiment.train.steps
    step = trainer(model, experiment.optimizer, experiment.task.label_smoothing, steps)
    for number, batch in enumerate(batches(experiment.data.open("train"), experiment.seed, steps)):
        loss = step(batch)
        if number % 50 == 0:
            print(f"PyTorch, step {number}/{steps}  loss {float(loss):.4f}", flush=True)
    tokenizer = experiment.data.open_tokenizer()
    most = experiment.data.source_length
    sources = experiment.data.encode(texts.sources)
    sources = [s if len(s) <= most else np.append(s[: most - 1], s[-1:]) for s in sources]
    options = {"end": tokenizer.end, "vocab": tokenizer.vocab_size, "extra": EXTRA}
    return [tokenizer.decode(tokens).strip() for tokens in translate(model, sources, **options)]


PEERS = {"ours": train_ours, "torch": train_torch}


def words_of(args: argparse.Namespace, seed: int, rate: float) -> list[str]:
    """The words of a run."""
    steps = 5 if args.quick else args.steps
    words = ["--seed", str(seed), "--optimizer.learning-rate", str(rate)]
    words += ["--train.steps", str(steps), "--eval.every", str(steps), "--log.no-tensorboard"]
    return [*words, *(["--data.cache-dir", args.cache_dir] if args.cache_dir else [])]


def measure(args: argparse.Namespace, name: str, seed: int, rate: float, split: str) -> list[float]:
    """[BLEU, chrF] of one run."""
    begin = time.process_time()
    experiment: Any = load(args.data_dir, words_of(args, seed, rate))
    texts = Texts(experiment.data, args.data_dir, split)
    if args.quick:
        texts.sources, texts.targets = texts.sources[:4], texts.targets[:4]
    with tempfile.TemporaryDirectory() as scratch:
        scores = score(PEERS[name](experiment, Path(scratch), texts), texts.targets)
    spent = time.process_time() - begin
    print(
        f"{name}, rate {rate}, seed {seed}, {split}: BLEU {scores['bleu']:.2f} chrF {scores['chrf']:.2f},"
        f" {spent:.0f} CPU s",
        flush=True,
    )
    return [scores["bleu"], scores["chrf"]]


def main() -> None:
    """Prints the scores."""
    args = parse()
    names = args.only or [*PEERS]
    if not importlib.util.find_spec("torch"):
        print("without PyTorch; to measure it too: pip install -r requirements/peers.txt")
        names = [name for name in names if name != "torch"]
    if args.select:
        for name in names:
            for rate in RATES:
                measure(args, name, 0, rate, "eval")
        return
    data: Any = load(args.data_dir, words_of(args, 0, CHOSEN[0])).data
    texts = Texts(data, args.data_dir, "test")
    copied = score(texts.sources, texts.targets)
    print(f"copy the source: BLEU {copied['bleu']:.2f} chrF {copied['chrf']:.2f}", flush=True)
    for name in names:
        rate = args.rates[[*PEERS].index(name)]
        seeds = 1 if args.quick else args.seeds
        found = np.array([measure(args, name, seed, rate, "test") for seed in range(seeds)])
        mean, std = found.mean(0), found.std(0, ddof=1) if seeds > 1 else np.zeros(2)
        print(
            f"{name}, mean of {seeds}: BLEU {mean[0]:.2f} +- {std[0]:.2f}, chrF {mean[1]:.2f} +- {std[1]:.2f}"
        )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="", help="a folder of train, eval and test.parquet")
    parser.add_argument("--cache-dir", default="", help="data.cache_dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs=2, default=CHOSEN, help="ours, PyTorch's")
    parser.add_argument("--only", nargs="*", choices=PEERS)
    parser.add_argument("--select", action="store_true", help="each rate, on the evaluation split")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
