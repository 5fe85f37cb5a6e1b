"""Preferences: direct preference optimisation on pairs of answers (pip install jinja2).

python run.py --experiment dpo        # numbers in words, made up; expect eval/accuracy 0.9
python run.py --experiment dpo --init.from DIR --init.lora 16 --data.files A.jsonl --data.eval-files B.jsonl

DIR is what save_pretrained of transformers writes, with its tokenizer and chat template, of a family that
docs/finetune.md lists. With adapters the reference is DIR's model without them. Without DIR a small model of
random weights, in about half a minute on 2 CPU cores. Cost: 4 times the forward pass of DIR's model.
"""

import os

import numpy as np

from spmd import Experiment
from spmd.data.text.chat import Preferences
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import DPO
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.weights.huggingface.model import from_directory

SMALL = Transformer(vocab=256, length=128, layers=2, embed=96, heads=4, tied=True)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def made(split: str) -> list[tuple[str, str, str]]:
    """A digit, its name and another name: 2,000 to train on, 200 others to evaluate on."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    rows = []
    for _ in range(2000 if split == "train" else 200):
        right, wrong = rng.choice(10, 2, replace=False)
        rows.append((f"write {right}", NAMES[right], NAMES[wrong]))
    return rows


def config(init_from: str = "") -> Experiment:
    """The whole model is trained, beside a frozen copy; --init.lora 16 trains adapters and needs no copy."""
    model = from_directory(init_from) if init_from else SMALL
    length = min(model.length, 1024)
    return Experiment(
        model=model,
        task=DPO(),
        data=Preferences(
            made=made,
            tokenizer=os.path.join(init_from, "tokenizer.json") if init_from else "bytes",
            template="" if init_from else "plain",
            sequence_length=length if init_from else 64,
            batch_size=8 if init_from else 32,
            eval_batch_size=8 if init_from else 32,
        ),
        optimizer=AdamW(
            learning_rate=5e-6 if init_from else 1e-3,
            warmup_steps=5,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=150),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=50, best="eval/loss", best_is="lowest"),
    )
