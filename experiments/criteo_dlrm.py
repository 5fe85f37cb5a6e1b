"""DLRM of MLPerf Training (v1) on Criteo's terabyte of clicks: 26 tables, 188 million rows of 128 numbers.

python run.py --experiment criteo_dlrm --data.files 'criteo/day_[0-9]' --data.eval-files criteo/day_23

Not run to its end here; MLPerf's AUC is 0.8025. The tables take 90 GiB, half of it with bfloat16 rows.
Without files a log of 20,000 lines is generated; --model.limit 1000 --data.limit 1000: small tables.
"""

from spmd import Experiment
from spmd.data.criteo import Criteo
from spmd.models.dlrm import DLRM
from spmd.optim import SGD, RowWise
from spmd.tasks import ClickPrediction
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

# Ids of each category of the terabyte, of at most 40 million (max_ind_range of MLPerf's reference).
IDS = (
    *(39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63),
    *(38_532_951, 2_953_546, 403_346, 10, 2_208, 11_938, 155, 4, 976),
    *(14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36),
)


def config() -> Experiment:
    """MLPerf's widths; plain SGD, for rows too."""
    return Experiment(
        model=DLRM(ids=IDS, dim=128, bottom=(512, 256), top=(1024, 1024, 512, 256)),
        task=ClickPrediction(),
        data=Criteo(ids=IDS, batch_size=2048, eval_batch_size=16384),
        optimizer=SGD(learning_rate=1.0, momentum=0.0, warmup_steps=5, rows=RowWise(kind="sgd")),
        train=TrainConfig(epochs=1),
        eval=EvalConfig(every=10_000),
        checkpoint=CheckpointConfig(every=10_000, best="eval/auc"),
    )
