"""Distillation: a small language model learns the distributions of a frozen teacher.

python run.py --experiment distill        # a teacher of random weights, to see it run
python run.py --experiment distill --task.teacher.from DIR --data.files 'TEXT/*.txt'

DIR is what save_pretrained of transformers writes, with its tokenizer, of a family that docs/finetune.md
lists. The student is the teacher with half of its layers, and random weights; --init.from STUDENT reads a
student from another such directory. Without files the text is the embedded source of Python's library. Cost:
3 times the student's forward pass and one of the teacher's.
"""

import dataclasses
import os

from spmd import Experiment
from spmd.data.text.embedded import TextOrEmbedded
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import Distillation, FrozenModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.weights.huggingface.model import from_directory

TINY = Transformer(
    vocab=256, length=128, layers=4, embed=64, heads=4, kv_heads=2, mlp=192, tied=True
)


def config(task_teacher_from: str = "", init_from: str = "") -> Experiment:
    """Half of the teacher's layers; a temperature of 2, the divergence counts for nine tenths."""
    teacher = from_directory(task_teacher_from) if task_teacher_from else TINY
    student = dataclasses.replace(teacher, layers=max(teacher.layers // 2, 1))
    student = from_directory(init_from) if init_from else student
    length = min(teacher.length, student.length, 1024)
    tokenizer = os.path.join(task_teacher_from, "tokenizer.json") if task_teacher_from else "bytes"
    tokens = 4096 if task_teacher_from else 1024
    return Experiment(
        model=student,
        task=Distillation(teacher=FrozenModel(model=teacher), temperature=2.0, weight=0.9),
        data=TextOrEmbedded(
            name="stdlib_source",
            eval_split="test[:5]",
            tokenizer=tokenizer,
            sequence_length=length,
            batch_size=max(tokens // length, 1),
            eval_batch_size=max(2 * tokens // length, 1),
        ),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=5, clip_norm=1.0),
        train=TrainConfig(steps=100),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=50, best="eval/loss", best_is="lowest"),
    )
