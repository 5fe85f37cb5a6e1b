"""A checkpoint of Hugging Face, fine-tuned: the model is the one of its directory's config.json.

python run.py --experiment hf        # about 15 s on 2 CPU cores; expect eval/loss 2.6
python run.py --experiment hf --init.from DIR --data.files 'TEXT/*.jsonl' --model.dtype bfloat16

DIR is what save_pretrained of transformers writes: config.json, safetensors, tokenizer.json, of a family that
docs/finetune.md lists. Nothing else has to be written for a new checkpoint of such a family. Without DIR a
tiny Llama of random weights learns bytes; without files the text is the embedded source of Python's library.
Cost: 3 times the forward pass of DIR's model on 4096 tokens a step.
"""

import os

from spmd import Experiment
from spmd.data.text.embedded import TextOrEmbedded
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.weights.huggingface.model import from_directory

TINY = Transformer(
    vocab=256, length=128, layers=2, embed=64, heads=4, kv_heads=2, mlp=192, tied=True
)


def config(init_from: str = "") -> Experiment:
    """The whole model is trained; --init.lora 16 trains adapters, --init.freeze PATTERN all but some."""
    model = from_directory(init_from) if init_from else TINY
    length = min(model.length, 1024)
    tokens = 4096 if init_from else 2048
    return Experiment(
        model=model,
        task=LanguageModel(),
        data=TextOrEmbedded(
            name="stdlib_source",
            eval_split="test[:5]",
            tokenizer=os.path.join(init_from, "tokenizer.json") if init_from else "bytes",
            sequence_length=length,
            batch_size=max(tokens // length, 1),
            eval_batch_size=max(2 * tokens // length, 1),
        ),
        optimizer=AdamW(
            learning_rate=2e-5 if init_from else 3e-3,
            warmup_steps=5,
            weight_decay=0.0 if init_from else 0.1,
            clip_norm=1.0,
        ),
        train=TrainConfig(steps=200 if init_from else 100),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=50, best="eval/loss", best_is="lowest"),
    )
