"""Matrix factorisation (Koren et al. 2009): ratings of films, rows of users and films in sparse tables.

python run.py --experiment movielens_mf        # 10 s on 2 CPU cores; expect eval/rmse 0.728

The log is generated. MovieLens 100K: --data.files ml-100k/u1.base --data.eval-files ml-100k/u1.test;
expect 0.909, the mean of folds u1 to u5.
"""

from spmd import Experiment
from spmd.data.interactions import RatingLog
from spmd.models.recommenders import MatrixFactorization
from spmd.optim import SGD, RowWise
from spmd.tasks import RatingPrediction
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """Plain SGD, for the mean of the ratings and, at a rate of their own, for rows."""
    return Experiment(
        model=MatrixFactorization(dim=64),
        task=RatingPrediction(),
        data=RatingLog(batch_size=1024, eval_batch_size=4096),
        optimizer=SGD(
            learning_rate=0.05, momentum=0.0, warmup_steps=0, rows=RowWise(kind="sgd", rate=400.0)
        ),
        train=TrainConfig(epochs=25),
        eval=EvalConfig(every=400),
        checkpoint=CheckpointConfig(every=400, best="eval/rmse", best_is="lowest"),
    )
