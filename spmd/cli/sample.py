"""run.py sample: continue prompts with the language model of a run, answer or translate lines."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from spmd.core.fields import check
from spmd.data.text.pairs import Pairs
from spmd.experiment import registry

if TYPE_CHECKING:
    import numpy as np

    from spmd.data.text.tokenizer import Tokenizer
    from spmd.experiment.base import Experiment


MOST_TOKENS = 200  # without --tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Prompt, length and temperature of a sample; the search of a translation."""

    prompt: tuple[str, ...] = ()
    """Texts to continue, all in one batch; none starts a document where the tokenizer can. Translated: none
    reads lines from standard input."""
    tokens: int = 0
    """Most tokens to add to each; 0 is 200, or fewer where the model's positions end before. A translation
    may be so much longer than its source; 0 is 50."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 is all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together reach this probability."""
    draw: Annotated[int, tyro.conf.arg(name="draw-seed")] = 0
    """Seed of the draws; --seed is that of the run."""
    beams: int = 4
    """Translations only: width of the beam search; 0 draws tokens, as --temperature says."""
    length_penalty: float = 0.6
    """Translations only: exponent a of ((5 + length) / 6)^a, by which a beam search divides."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""
    chat: bool = False
    """Answer the lines of standard input, by the chat template of the data; an empty line begins anew."""


def run(name: str, words: Sequence[str]) -> int:
    """Print each prompt and its continuation: a single one as it is generated, several in turn.

    Of an experiment on pairs: a line with the translation of each.
    """
    exp, options = registry.load(name, words, SampleOptions)
    if options.chat:
        from spmd.cli.chat import answer_lines

        return answer_lines(exp, options)
    if isinstance(exp.data, Pairs):
        return _translate(exp, exp.data, options)
    tokenizer = exp.data.open_tokenizer()
    from spmd.train import sample

    choice = sample.Choice(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )
    texts = options.prompt or ("",)
    prompts = [_encode_prompt(tokenizer, text) for text in texts]
    check(options.draw >= 0, f"--draw-seed {options.draw} must not be negative")
    snapshot = exp.restore(None if options.step < 0 else options.step, same=("tokenizer",))
    check(options.tokens >= 0, f"--tokens {options.tokens} must not be negative")
    remaining = sample.remaining_positions(snapshot, prompts)
    tokens = sample.generate(
        snapshot,
        prompts,
        num_tokens=options.tokens or min(MOST_TOKENS, remaining),
        choice=choice,
        seed=options.draw,
        end=tokenizer.end,
        vocab=tokenizer.vocab_size,
    )
    columns: list[np.ndarray] = []  # the tokens of each step, as they come
    if len(texts) == 1:
        sys.stdout.write(texts[0])
        for text in stream(
            tokenizer, (int(token[0]) for token in _collect(tokens, columns)), prompts[0]
        ):
            print(text, end="", flush=True)
        print()
    else:
        columns += tokens
        for i, text in enumerate(texts):
            added = "".join(stream(tokenizer, (int(token[i]) for token in columns), prompts[i]))
            print(f"--- {i + 1}\n{text}{added}")
    ended = all(any(token[i] == tokenizer.end for token in columns) for i in range(len(texts)))
    if not options.tokens and len(columns) == remaining < MOST_TOKENS and not ended:
        print(f"note: the model's positions end after {remaining} tokens more", file=sys.stderr)
    return 0


def _translate(exp: Experiment, data: Pairs, options: SampleOptions) -> int:
    """Print the translations of the prompts, or of the lines of standard input, a line each."""
    from spmd.runtime import agree
    from spmd.train.beam import BeamSearch
    from spmd.train.sample import Choice
    from spmd.train.translate import Decoding
    from spmd.train.translation import translate_texts

    check(options.draw >= 0, f"--draw-seed {options.draw} must not be negative")
    search = BeamSearch(beams=options.beams or 1, alpha=options.length_penalty)
    choice = Choice(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    decoding = Decoding(
        search=search if options.beams else None,
        choice=choice,
        seed=options.draw,
        **({"extra": options.tokens} if options.tokens else {}),
    )
    snapshot = exp.restore(None if options.step < 0 else options.step, same=("tokenizer",))
    # Of several processes only the first has the user's standard input and output.
    read = lambda: [line.rstrip("\n") for line in sys.stdin]
    texts = options.prompt or agree.from_first(read, "lines of standard input")
    for text in translate_texts(snapshot, data, texts, decoding):
        agree.say(text)
    return 0


def _collect(tokens: Iterable[np.ndarray], columns: list[np.ndarray]) -> Iterator[np.ndarray]:
    for token in tokens:
        columns.append(token)
        yield token


def _encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of a prompt, after the token that begins a document."""
    import numpy as np

    (ids,) = tokenizer.encode([text])
    first = tokenizer.begin
    if first is None and not text:
        first = tokenizer.end  # after which another document begins
        check(
            first is not None,
            "an empty prompt: this tokenizer has no token that begins a document; give --prompt TEXT",
        )
    if first is not None:
        ids = np.concatenate([np.array([first]), ids])
    return np.asarray(ids, np.int32)


def stream(
    tokenizer: Tokenizer, tokens: Iterable[int], prompt: Sequence[int] | np.ndarray = ()
) -> Iterator[str]:
    """Yield the text that `tokens` add to `prompt`, as they are generated, to the end of the document.

    The concatenated text is that of prompt and tokens without that of the prompt: a decoder may drop the
    blank before a first word, so tokens are never decoded without those before them. Text that the next token
    may change is held back: characters of several tokens, until they are complete.
    """
    context = [int(token) for token in prompt]
    emitted = tokenizer.decode(context)
    text = emitted
    for token in tokens:
        if token == tokenizer.end:
            break
        context.append(token)
        text = tokenizer.decode(context)
        unsettled = tokenizer.unsettled(token)
        settled = text if not unsettled else emitted
        replaced = len(settled) - len(settled.rstrip("\ufffd"))
        settled = settled[: len(settled) - min(replaced, 4)]  # bytes of an incomplete character
        if len(settled) > len(emitted) and settled.startswith(emitted):
            yield settled[len(emitted) :]
            emitted = settled
            if len(context) > 2 * _CONTEXT:  # bounds the time of a token in a long text
                context = context[-_CONTEXT:]
                text = emitted = tokenizer.decode(context)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, emitted, strict=False))
    yield text[len(list(same)) :]


_CONTEXT = 512  # tokens that are decoded again with each new one
