"""Llama 3 70B (Grattafiori et al. 2024, arXiv 2407.21783), from random weights.

python run.py --experiment llama3_70b --data.files 'DIR/*.jsonl' --data.tokenizer FILE \\
    --mesh.data 1 --mesh.fsdp -1

Cost: 4 million tokens per step; the state takes 847 GB with AdamW in float32. Estimate for v5p:4x4x4 with
splash attention (docs/plan.md): 99 s per step. It was not run to its end here, so there is no loss to
expect: the steps are a budget to be set, Meta trained on 15 trillion tokens. A TFDS text set: --data.name
NAME. FILE is Llama 3's tokenizer.json.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """70,553,706,496 parameters."""
    return Experiment(
        model=Transformer(
            vocab=128_256,
            length=8192,
            layers=80,
            heads=64,
            kv_heads=8,
            embed=8192,
            mlp=28672,
            dtype="bfloat16",
            remat="full",
        ),
        task=LanguageModel(chunks=16),
        data=Text(
            tokenizer="tokenizer.json",
            sequence_length=8192,
            batch_size=512,
            eval_batch_size=64,
            eval_fraction=0.0005,
        ),
        optimizer=AdamW(
            learning_rate=1.5e-4,
            final_fraction=0.01,
            warmup_steps=8000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=100_000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000, best="eval/loss", best_is="lowest"),
    )
