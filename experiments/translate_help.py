"""English to German: an encoder-decoder on pairs of texts, scored by BLEU and chrF (pip install sacrebleu).

python run.py --experiment translate_help    # numbers in words, made up; 500 steps, 2 minutes on a free core

Expect eval/translation/exact 0.99. Without files the pairs are English number words and German ones, whose
order differs (twenty-one, einundzwanzig). docs/text.md has the command for pairs of files, and that for lines
of standard input.
"""

import numpy as np

from spmd import Experiment
from spmd.data.text.pairs import Pairs
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.optim import AdamW
from spmd.tasks import Translation
from spmd.train import CheckpointConfig, EvalConfig, TrainConfig
from spmd.train.translation import TranslationScores

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
EINS = (
    *("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"),
    *("elf", "zwölf"),
)
ZEHN = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
SHORT = {6: "sech", 7: "sieb"}  # before -zehn


def english(number: int) -> str:
    """A number below 1,000,000 in English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f"-{ONES[one]}" if one else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    first, rest = divmod(number, size)
    return f"{english(first)} {name}" + (f" {english(rest)}" if rest else "")


def german(number: int, last: bool = True) -> str:
    """The same in German; last: not followed by a further word, so that one is eins."""
    if number == 1 and not last:
        return "ein"
    if number <= 12:
        return EINS[number]
    if number < 20:
        return SHORT.get(number - 10, EINS[number - 10]) + "zehn"
    if number < 100:
        ten, one = divmod(number, 10)
        return (f"{german(one, last=False)}und" if one else "") + ZEHN[ten - 2]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    first, rest = divmod(number, size)
    return f"{german(first, last=False)}{name}" + (german(rest, last) if rest else "")


def made(split: str) -> list[tuple[str, str]]:
    """Numbers below 10,000: 3,900 to train on, 100 others to evaluate on."""
    rng = np.random.default_rng(0)
    drawn = np.unique((10 ** rng.uniform(0, 4, 12_000)).astype(int))
    numbers = rng.permutation(drawn)[:4000]
    part = numbers[100:] if split == "train" else numbers[:100]
    return [(english(int(number)), german(int(number))) for number in part]


def config() -> Experiment:
    """2 + 2 layers, 128 wide; pre-norm with GELU, the table shared by both sides and the head."""
    return Experiment(
        model=EncoderDecoder(
            vocab=512,
            encoder_layers=2,
            layers=2,
            embed=128,
            heads=4,
            mlp=512,
            activation="gelu",
            norm="layer",
            dropout=0.1,
            init_std=0.0,
        ),
        task=Translation(),
        data=Pairs(
            made=made,
            tokenizer="bpe:512",
            source_length=48,
            target_length=48,
            batch_size=16,
            eval_batch_size=64,
        ),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=5, b2=0.98, clip_norm=1.0),
        train=TrainConfig(steps=500),
        eval=EvalConfig(every=250),
        evaluations=(TranslationScores(name="translation"),),
        checkpoint=CheckpointConfig(best="eval/loss", best_is="lowest"),
    )
