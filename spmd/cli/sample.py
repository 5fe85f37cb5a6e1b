"""run.py sample: continues prompts with the language model of a run, on any mesh."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from spmd.core.fields import check
from spmd.experiment import registry

if TYPE_CHECKING:
    import numpy as np

    from spmd.data.text.tokenizer import Tokenizer


MOST_TOKENS = 200  # where --tokens says nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Prompt, length and temperature of a sample."""

    prompt: tuple[str, ...] = ()
    """Texts to continue, all in one batch; none starts a document where the tokenizer can."""
    tokens: int = 0
    """Most tokens to add to each; 0 is 200, or fewer where the model's positions end before."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    draw: Annotated[int, tyro.conf.arg(name="draw-seed")] = 0
    """Seed of the draws; the experiment's own seed stays what the run was trained with."""
    step: int = -1
    """Step of the checkpoint; -1 is the newest."""


def run(name: str, words: Sequence[str]) -> int:
    """Prints each prompt with what follows it: one as it comes, several one after the other."""
    exp, options = registry.load(name, words, SampleOptions)
    tokenizer = exp.data.open_tokenizer()
    from spmd.train import sample

    choice = sample.Choice(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )
    texts = options.prompt or ("",)
    prompts = [_ids(tokenizer, text) for text in texts]
    check(options.draw >= 0, f"--draw-seed {options.draw} must not be negative")
    snapshot = exp.restore(None if options.step < 0 else options.step, same=("tokenizer",))
    check(options.tokens >= 0, f"--tokens {options.tokens} must not be negative")
    room = sample.room(snapshot, prompts)
    drawn = sample.tokens(
        snapshot,
        prompts,
        num_tokens=options.tokens or min(MOST_TOKENS, room),
        choice=choice,
        seed=options.draw,
        end=tokenizer.end,
        vocab=tokenizer.vocab_size,
    )
    columns: list[np.ndarray] = []  # the tokens of each step, as they come
    if len(texts) == 1:
        sys.stdout.write(texts[0])
        for text in stream(
            tokenizer, (int(token[0]) for token in _kept(drawn, columns)), prompts[0]
        ):
            print(text, end="", flush=True)
        print()
    else:
        columns += drawn
        for i, text in enumerate(texts):
            added = "".join(stream(tokenizer, (int(token[i]) for token in columns), prompts[i]))
            print(f"--- {i + 1}\n{text}{added}")
    ended = all(any(token[i] == tokenizer.end for token in columns) for i in range(len(texts)))
    if not options.tokens and len(columns) == room < MOST_TOKENS and not ended:
        print(f"note: the model's positions end after {room} tokens more", file=sys.stderr)
    return 0


def _kept(drawn: Iterable[np.ndarray], columns: list[np.ndarray]) -> Iterator[np.ndarray]:
    for token in drawn:
        columns.append(token)
        yield token


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """A prompt's tokens, behind what begins a document."""
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
    """Yield the text that `tokens` add to `prompt`, as they come, up to the end of the document.

    All of it together is the text of prompt and tokens without that of the prompt: a decoder may drop the
    blank before a first word, so tokens are never decoded without those before them. What the next token may
    still change is held back: characters of several tokens, until they are whole.
    """
    held = [int(token) for token in prompt]
    shown = tokenizer.decode(held)
    text = shown
    for token in tokens:
        if token == tokenizer.end:
            break
        held.append(token)
        text = tokenizer.decode(held)
        unsettled = tokenizer.unsettled(token)
        settled = text if not unsettled else shown
        replaced = len(settled) - len(settled.rstrip("\ufffd"))
        settled = settled[
            : len(settled) - min(replaced, 4)
        ]  # bytes of a character that is not whole yet
        if len(settled) > len(shown) and settled.startswith(shown):
            yield settled[len(shown) :]
            shown = settled
            if len(held) > 2 * _CONTEXT:  # so that a long text does not take ever longer
                held = held[-_CONTEXT:]
                text = shown = tokenizer.decode(held)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, shown, strict=False))
    yield text[len(list(same)) :]


_CONTEXT = 512  # tokens that are decoded again with each new one
