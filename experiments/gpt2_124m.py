"""GPT-2 124M, trained as nanoGPT does (github.com/karpathy/nanoGPT, config/train_gpt2.py).

python run.py --experiment gpt2_124m --data.files 'DIR/*.jsonl' --data.tokenizer FILE --model.attention cudnn

Cost: half a million tokens per step, 300 billion in all; nanoGPT needs 4 days on 8 A100. Expect a loss of
2.85 on OpenWebText (nanoGPT's); it was not run to its end here. A TFDS text set: --data.name NAME. FILE is
GPT-2's tokenizer.json.
"""

from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig


def config() -> Experiment:
    """124,439,808 parameters, and 47 rows of padding in the embedding, so that the mesh divides it."""
    return Experiment(
        model=Transformer(
            vocab=50257,
            vocab_multiple=128,
            length=1024,
            layers=12,
            heads=12,
            embed=768,
            norm="layer",
            activation="gelu",
            position="learned",
            bias=True,
            tied=True,
            dtype="bfloat16",
        ),
        task=LanguageModel(),
        data=Text(
            tokenizer="tokenizer.json",
            sequence_length=1024,
            batch_size=480,
            eval_batch_size=64,
            eval_fraction=0.0005,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            final_fraction=0.1,
            warmup_steps=2000,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=600_000),
        eval=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000, best="eval/loss", best_is="lowest"),
    )
