"""A byte-level mixture of 8 experts (as Mixtral, arXiv 2401.04088), small, on Python's own standard library.

python run.py --experiment moe_tiny        # 4 minutes on 2 CPU cores; expect eval/loss 2.00

The text is the library's source, as in `lm_stdlib` (no network). Each token goes to 2 experts of half the
usual width: the matmuls of a dense model of this size, though on CPUs XLA's ragged_dot multiplies by all 8.
metrics.jsonl has train/load/0 to train/load/7: how full each expert is, 1 where loads are even.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.moe import Experts
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """Two layers, 128 wide; a document is a module, ended by byte 255."""
    return Experiment(
        model=Transformer(
            vocab=256,
            length=128,
            layers=2,
            heads=4,
            embed=128,
            mlp=256,
            experts=Experts(num=8, top_k=2),
            scan=False,
        ),
        task=LanguageModel(),
        data=Text(
            name="stdlib_source",
            eval_split="test[:5]",
            sequence_length=128,
            batch_size=8,
            eval_batch_size=64,
        ),
        optimizer=AdamW(
            learning_rate=1e-3, final_fraction=0.1, warmup_steps=5, b2=0.99, clip_norm=1.0
        ),
        train=TrainConfig(steps=300),
        eval=EvalConfig(every=300),
        checkpoint=CheckpointConfig(every=300, best="eval/loss", best_is="lowest"),
    )
