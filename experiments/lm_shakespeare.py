"""A character-level model of Shakespeare: nanoGPT's small CPU setting (github.com/karpathy/nanoGPT, README).

python run.py --experiment lm_shakespeare --data.dir DIR    # 5 minutes on 2 CPU cores; expect eval/loss 1.79

The stock TFDS set splits the text where nanoGPT does: `train` is the first 90 % of its characters,
`validation` and `test` together the last 10 %. Evaluation reads those once; nanoGPT averages 20 batches.
Positions are rotary: with nanoGPT's learned table (--model.position learned) the loss was 1.903.
Training windows begin at any character, as nanoGPT's do (stride=1), but each is drawn once before any again.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """GPT-2's architecture with rotary positions; 4 layers, 128 wide, windows of 64 characters."""
    return Experiment(
        model=Transformer(
            vocab=65,
            length=64,
            layers=4,
            heads=4,
            embed=128,
            norm="layer",
            activation="gelu",
            position="rope",
            rope_theta=10_000.0,
            tied=True,
            scan=False,
        ),
        task=LanguageModel(),
        data=Text(
            name="tiny_shakespeare",
            eval_split="validation+test",
            tokenizer="chars",
            sequence_length=64,
            stride=1,
            batch_size=12,
            eval_batch_size=128,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            final_fraction=0.1,
            warmup_steps=100,
            b2=0.99,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=2000),
        eval=EvalConfig(every=500),
        checkpoint=CheckpointConfig(every=1000, best="eval/loss", best_is="lowest"),
    )
