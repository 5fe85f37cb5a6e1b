"""A byte-level language model on the source of Python's own standard library (embedded: no network).

python run.py --experiment lm_stdlib        # about 2 minutes on 2 CPU cores; expect eval/loss 1.36
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """Four layers, 128 wide; a document is a module, ended by byte 255."""
    return Experiment(
        model=Transformer(vocab=256, length=128, layers=4, heads=4, embed=128, scan=False),
        task=LanguageModel(),
        data=Text(
            name="stdlib_source",
            eval_split="test[:5]",
            sequence_length=128,
            batch_size=16,
            eval_batch_size=64,
        ),
        optimizer=AdamW(
            learning_rate=1e-3, final_fraction=0.1, warmup_steps=5, b2=0.99, clip_norm=1.0
        ),
        train=TrainConfig(steps=800),
        eval=EvalConfig(every=400),
        checkpoint=CheckpointConfig(every=400, best="eval/loss", best_is="lowest"),
    )
