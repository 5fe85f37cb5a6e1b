"""Supervised fine-tuning on conversations, by the chat template of the tokenizer (pip install jinja2).

python run.py --experiment sft        # numbers in words, made up; expect eval/accuracy 0.9
python run.py --experiment sft --init.from DIR --init.lora 16 --data.files A.jsonl --data.eval-files B.jsonl

DIR is what save_pretrained of transformers writes, with its tokenizer and chat template, of a family that
docs/finetune.md lists. The loss is on what the assistant says. Without DIR a small model of random weights
learns bytes, in about half a minute on 2 CPU cores. Cost: 3 times the forward pass of DIR's model on 4096
tokens a step.
"""

import os
from typing import Any

import numpy as np

from spmd import Experiment
from spmd.data.text.chat import Chat
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.weights.huggingface.model import from_directory

SMALL = Transformer(vocab=256, length=128, layers=2, embed=96, heads=4, tied=True)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def turn(rng: np.random.Generator) -> list[dict[str, str]]:
    """A question about a digit, and its answer."""
    digit = int(rng.integers(10))
    kind = rng.integers(3)
    question, answer = (
        (f"write {digit}", NAMES[digit]),
        (f"after {digit}", str(digit + 1)),
        (f"read {NAMES[digit]}", str(digit)),
    )[kind]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def made(split: str) -> list[tuple[Any, ...]]:
    """Conversations of one to three turns: 2,000 to train on, 200 others to evaluate on."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    conversation = lambda: [message for _ in range(rng.integers(1, 4)) for message in turn(rng)]
    return [(conversation(), None, None) for _ in range(2000 if split == "train" else 200)]


def config(init_from: str = "") -> Experiment:
    """The whole model is trained; --init.lora 16 trains adapters."""
    model = from_directory(init_from) if init_from else SMALL
    length = min(model.length, 1024)
    tokens = 4096 if init_from else 2048
    return Experiment(
        model=model,
        task=LanguageModel(),
        data=Chat(
            made=made,
            tokenizer=os.path.join(init_from, "tokenizer.json") if init_from else "bytes",
            template="" if init_from else "plain",
            sequence_length=length,
            batch_size=max(tokens // length, 1),
            eval_batch_size=max(2 * tokens // length, 1),
        ),
        optimizer=AdamW(
            learning_rate=2e-5 if init_from else 3e-3,
            warmup_steps=5,
            weight_decay=0.0 if init_from else 0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=150),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=50, best="eval/loss", best_is="lowest"),
    )
