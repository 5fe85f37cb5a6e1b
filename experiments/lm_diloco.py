"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): 8 replicas that meet every 50 steps, a byte-level model.

python run.py --experiment lm_diloco --strategy auto --train.steps 1000 --run.dir runs/begun
python run.py --experiment lm_diloco --init.from runs/begun --simulate 8 --mesh.replica 8 --mesh.data 1

Some minutes on 2 CPU cores. From a model that has begun, as in the paper: eval/loss 1.670, synchronous 1.654
(0.9 % less), at 1/50 of the bytes over `replica`; measured with the replicas on one device. From scratch
1,000 steps give 2.00 against 1.76: replicas of 512 tokens a step are too noisy to begin with.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.strategies import Local
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """One layer, 32 wide, on the source of Python's standard library, as `lm_stdlib`."""
    return Experiment(
        model=Transformer(vocab=256, length=64, layers=1, heads=2, embed=32, scan=False),
        task=LanguageModel(),
        data=Text(
            name="stdlib_source",
            eval_split="test[:5]",
            sequence_length=64,
            batch_size=64,
            eval_batch_size=512,
        ),
        optimizer=AdamW(
            learning_rate=1e-3, final_fraction=0.1, warmup_steps=20, b2=0.99, clip_norm=1.0
        ),
        strategy=Local(replicas=8, period=50, outer="nesterov"),
        train=TrainConfig(steps=500, steps_per_dispatch=25),
        eval=EvalConfig(every=250),
        checkpoint=CheckpointConfig(every=500, best="eval/loss", best_is="lowest"),
    )
