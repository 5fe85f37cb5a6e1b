"""Llama 3 8B (Grattafiori et al. 2024, arXiv 2407.21783), from random weights.

python run.py --experiment llama3_8b --data.files 'DIR/*.jsonl' --data.tokenizer FILE \\
    --mesh.data 1 --mesh.fsdp -1

Cost: 4 million tokens per step; the state takes 96 GB with AdamW in float32. Estimate of `run.py plan
--search` for v5p:4x4x4 with splash attention: 10.4 s per step, 12 days in all. It was not run to its end
here, so there is no loss to expect: the steps are a budget to be set, Meta trained on 15 trillion tokens. A
TFDS text set: --data.name NAME. FILE is Llama 3's tokenizer.json.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """8,030,261,248 parameters."""
    return Experiment(
        model=Transformer(
            vocab=128_256,
            length=8192,
            layers=32,
            heads=32,
            kv_heads=8,
            embed=4096,
            mlp=14336,
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
            learning_rate=3e-4,
            final_fraction=0.01,
            warmup_steps=8000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=100_000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000, best="eval/loss", best_is="lowest"),
    )
