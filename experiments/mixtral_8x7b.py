"""Mixtral 8x7B (Jiang et al. 2024, arXiv 2401.04088), from random weights or from Hugging Face's.

python run.py --experiment mixtral_8x7b --data.files 'DIR/*.jsonl' --data.tokenizer FILE \\
    --mesh.data 1 --mesh.fsdp -1 --mesh.expert 8

Each token goes to 2 of 8 experts: 12.9 billion of 46.7 billion parameters take part. Cost: 4 million tokens
per step; the estimate for v5p:4x4x4 with splash attention (docs/plan.md) is 18.4 s per step. It was not run
to its end here, so there is no loss to expect; the training data is not published, and the steps are a
budget to be set. FILE is Mixtral's tokenizer.json, and --init.from DIR its weights.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """46,702,792,704 parameters."""
    return Experiment(
        model=Transformer(
            vocab=32_000,
            length=32_768,
            layers=32,
            heads=32,
            kv_heads=8,
            embed=4096,
            mlp=14_336,
            experts=Experts(num=8, top_k=2, balance=0.02),
            rope_theta=1_000_000.0,
            dtype="bfloat16",
            remat="full",
        ),
        task=LanguageModel(chunks=4),
        data=Text(
            tokenizer="tokenizer.json",
            sequence_length=4096,
            batch_size=1024,
            eval_batch_size=64,
            eval_fraction=0.0005,
        ),
        optimizer=AdamW(
            learning_rate=3e-4,
            final_fraction=0.1,
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=100_000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000, best="eval/loss", best_is="lowest"),
    )
