"""BLEU and chrF of translations, measured during training and by `run.py eval`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd.core.fields import check
from spmd.data import Split
from spmd.data.text.pairs import Pairs
from spmd.runtime import agree
from spmd.train.beam import BeamSearch
from spmd.train.evaluations import Evaluation
from spmd.train.translate import Decoding, translate

if TYPE_CHECKING:
    from spmd.train.program import Program
    from spmd.train.snapshot import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranslationScores(Evaluation):
    """Translates pairs and compares with their targets: `exact`, and by sacrebleu `bleu` and `chrf`.

    exact: share of translations that are their targets. BLEU (Papineni et al. 2002; 13a tokens, Post 2018)
    and chrF (Popovic 2015; chrF2) are those of the corpus, from 0 to 100; without sacrebleu they are left
    out, and a note says so.
    """

    data: Pairs | None = None
    """The pairs; None is the experiment's data."""
    split: Split = "eval"
    """The split that is translated."""
    search: BeamSearch | None = dataclasses.field(default_factory=BeamSearch)
    """Beam search; None takes the most likely token each time."""
    most: int = 0
    """Pairs that are translated, the first ones; 0 is all."""
    batch_size: int = 32
    """Sources decoded at once."""

    def check(self, program: Program) -> None:
        """ValueError where there are no pairs; a note where BLEU cannot be measured."""
        self._pairs(program.data)
        if not measures_bleu():
            agree.say(
                f"note: evaluation {self.name!r} gives no BLEU and chrF: pip install sacrebleu",
                sys.stderr,
            )

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | None]:
        """The scores of all its pairs."""
        data = self._pairs(snapshot.program.data)
        chosen = itertools.islice(data.pairs(self.split), self.most or None)
        sources, references = (list(side) for side in zip(*chosen, strict=True))
        decoding = Decoding(search=self.search, batch_size=self.batch_size)
        return score(translate_texts(snapshot, data, sources, decoding), references)

    def _pairs(self, data: Any) -> Pairs:
        pairs = self.data or data
        check(
            isinstance(pairs, Pairs),
            f"evaluation {self.name!r} translates pairs, and the data is {type(pairs).__name__}; give it"
            " data=Pairs(...)",
        )
        return pairs


def translate_texts(
    snapshot: Snapshot, data: Pairs, texts: Sequence[str], decoding: Decoding
) -> list[str]:
    """The best translation of each text; a source longer than data.source_length is cut there.

    Args:
        snapshot: of an encoder-decoder.
        data: whose tokenizer.
        texts: sources; an empty one stays empty.
        decoding: search or draws.

    Returns:
        Texts, in this order.
    """
    tokenizer = data.open_tokenizer()
    assert tokenizer.end is not None
    places = [i for i, text in enumerate(texts) if text.strip()]
    sources = data.encode([texts[i] for i in places])
    most = data.source_length
    cut = [s if len(s) <= most else np.append(s[: most - 1], s[-1:]) for s in sources]
    options = {"decoding": decoding, "end": tokenizer.end, "vocab": tokenizer.vocab_size}
    found = translate(snapshot, cut, **options) if cut else []
    translated = [""] * len(texts)
    for place, hypotheses in zip(places, found, strict=True):
        translated[place] = tokenizer.decode(hypotheses[0].tokens).strip()
    return translated


def measures_bleu() -> bool:
    """Whether sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def score(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`exact`, and by sacrebleu `bleu` and `chrf`, of translations.

    Args:
        hypotheses: translations.
        references: the text that each should be.

    Returns:
        {name: value}.
    """
    equal = [h == r.strip() for h, r in zip(hypotheses, references, strict=True)]
    scores = {"exact": sum(equal) / len(equal)}
    if measures_bleu():
        sacrebleu: Any = importlib.import_module("sacrebleu")
        targets = [list(references)]
        scores["bleu"] = float(sacrebleu.corpus_bleu(list(hypotheses), targets).score)
        scores["chrf"] = float(sacrebleu.corpus_chrf(list(hypotheses), targets).score)
    return scores
