"""DLRM (Naumov et al. 2019) on a generated log of clicks: 26 categories in sparse tables over all devices.

python run.py --experiment clicks        # 1 minute on 2 CPU cores; expect eval/auc 0.740

The log has no file and any size: --data.examples 10000000. A row is a function of its number. Knowing the
odds that the labels are drawn from, one would reach an AUC of 0.827.
"""

from spmd import Experiment
from spmd.data.clicks import Clicks
from spmd.models.dlrm import DLRM
from spmd.optim import AdamW, RowWise
from spmd.tasks import ClickPrediction
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

IDS = tuple(int(10 * 1.4**i) for i in range(26))


def config() -> Experiment:
    """Embeddings of width 16, row-wise Adagrad for them, AdamW for the rest."""
    return Experiment(
        model=DLRM(ids=IDS),
        task=ClickPrediction(),
        data=Clicks(ids=IDS, batch_size=1024, eval_batch_size=2000),
        optimizer=AdamW(
            learning_rate=5e-3, weight_decay=0.0, warmup_steps=5, rows=RowWise(rate=20.0)
        ),
        train=TrainConfig(epochs=1),
        eval=EvalConfig(every=500),
        checkpoint=CheckpointConfig(every=500, best="eval/auc"),
    )
