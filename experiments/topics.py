"""Topics of paragraphs by a small BERT-like encoder: accuracy and macro-F1.

python run.py --experiment topics    # made-up paragraphs of nine topics; 250 steps; expect eval/accuracy 0.84
python run.py --experiment topics --data.files train.parquet --data.eval-files eval.parquet

Files have the columns `text` and `label`, a number from 0 to 8; --data.tokenizer bpe:8000 --model.vocab 8064
--data.length 128 --model.length 128 suits paragraphs of software help.
"""

import numpy as np

from spmd import Experiment
from spmd.data.text.labelled import LabelledTexts
from spmd.models.encoder import Encoder
from spmd.optim import AdamW
from spmd.tasks import TextClassification
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig

TOPICS = 9


def made(split: str) -> list[tuple[str, int]]:
    """Paragraphs of 12 words, a third of them from the 20 words of their topic, the others from all."""
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lnrst"])
    rng = np.random.default_rng(0 if split == "train" else 1)
    num = 2000 if split == "train" else 300
    labels = rng.integers(0, TOPICS, num)
    own = words[labels[:, None] * 20 + rng.integers(0, 20, (num, 12))]
    other = words[rng.integers(0, len(words), (num, 12))]
    chosen = np.where(rng.random((num, 12)) < 1 / 3, own, other)
    return [(" ".join(row), int(label)) for row, label in zip(chosen, labels, strict=True)]


def config() -> Experiment:
    """Two layers, 64 wide; norms after the sums, the mean of the tokens into the head."""
    return Experiment(
        model=Encoder(
            vocab=512, length=32, classes=TOPICS, layers=2, embed=64, heads=4, dropout=0.1
        ),
        task=TextClassification(),
        data=LabelledTexts(
            made=made, tokenizer="bpe:512", length=32, batch_size=32, eval_batch_size=128
        ),
        optimizer=AdamW(learning_rate=2e-3, warmup_steps=5, weight_decay=0.01, clip_norm=1.0),
        train=TrainConfig(epochs=4),
        eval=EvalConfig(every=100),
        checkpoint=CheckpointConfig(best="eval/macro_f1"),
    )
