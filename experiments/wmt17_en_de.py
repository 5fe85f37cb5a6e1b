"""Transformer base on WMT17 English to German (Vaswani et al. 2017), with flax's data (flax/examples/wmt).

python run.py --experiment wmt17_en_de --data.dir DIR    # DIR holds the TFDS set wmt17_translate/de-en

Cost: flax's example trained 100,000 steps of 256 packed rows in 1 h 58 on 8 V100 and reached 25.69 BLEU on
newstest2014 with a beam search of width 4. This configuration is planned, and its first steps run on made-up
pairs (tests/train/test_translation.py); it was not run to its end here. The vocabulary is 32,000 tokens of
byte-level BPE, flax's one of SentencePiece. pip install sacrebleu for BLEU.
"""

from spmd import Experiment
from spmd.data.text.pairs import Pairs
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.optim import AdamW
from spmd.tasks import Translation
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.train.translation import TranslationScores


def config() -> Experiment:
    """6 + 6 layers, 512 wide, 8 heads; one table for both sides and the head."""
    return Experiment(
        model=EncoderDecoder(
            vocab=32_000,
            encoder_layers=6,
            layers=6,
            embed=512,
            heads=8,
            mlp=2048,
            activation="gelu",
            norm="layer",
            dropout=0.1,
            init_std=0.0,
            dtype="bfloat16",
        ),
        task=Translation(),
        data=Pairs(
            name="wmt17_translate/de-en",
            source_column="en",
            target_column="de",
            tokenizer="bpe:32000",
            source_length=256,
            target_length=256,
            batch_size=256,
            eval_batch_size=256,
        ),
        optimizer=AdamW(learning_rate=2e-3, warmup_steps=1000, b2=0.98, weight_decay=0.0),
        train=TrainConfig(steps=100_000),
        eval=EvalConfig(every=5000),
        evaluations=(TranslationScores(name="translation", every=20_000, batch_size=64),),
        checkpoint=CheckpointConfig(every=5000, best="eval/loss", best_is="lowest"),
    )
