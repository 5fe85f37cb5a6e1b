"""SASRec (Kang and McAuley 2018): the next film of a user, by a softmax over all films.

python run.py --experiment movielens_sasrec    # 2 CPU minutes; after 3 epochs eval/test/hit@10 is 0.307

The log is generated. MovieLens 100K: --data.files ml-100k/u.data --data.titles ml-100k/u.item; expect 0.188,
and 0.121 with the films before among the candidates (eval/unmasked/hit@10), the means of five seeds.
"""

from spmd import Experiment
from spmd.data.interactions import HistoryLog
from spmd.models.sasrec import SASRec
from spmd.optim import AdamW
from spmd.tasks import NextItem
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.train.retrieval import FullRanking

LENGTH = 50


def config() -> Experiment:
    """Histories of 50 films; the last of each user is ranked against all others."""
    return Experiment(
        model=SASRec(length=LENGTH),
        task=NextItem(),
        data=HistoryLog(length=LENGTH, stride=LENGTH, batch_size=32, eval_batch_size=512),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.01, clip_norm=1.0, warmup_steps=20),
        train=TrainConfig(epochs=20),
        eval=EvalConfig(every=150),
        evaluations=(
            FullRanking(name="validation"),
            FullRanking(name="test", part="test"),
            FullRanking(name="unmasked", part="test", masked=False),  # as RecBole evaluates
        ),
        checkpoint=CheckpointConfig(every=150, best="eval/validation/ndcg@10"),
    )
