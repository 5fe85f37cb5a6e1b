"""run.py sample --chat: the model of a run answers the lines of standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from spmd.core.fields import check
from spmd.data.text.chat import ChatRecords

if TYPE_CHECKING:
    import numpy as np

    from spmd.cli.sample import SampleOptions
    from spmd.data.text.chat.template import ChatTemplate
    from spmd.data.text.tokenizer import Tokenizer
    from spmd.experiment.base import Experiment


def answer_lines(exp: Experiment, options: SampleOptions) -> int:
    """Print an answer to each line of standard input as it is generated.

    The lines and answers so far are a conversation, which the chat template writes; an answer ends at a token
    that ends a turn. An empty line begins another conversation.
    """
    import numpy as np

    from spmd.cli.sample import stream
    from spmd.runtime import agree

    data = exp.data
    check(
        isinstance(data, ChatRecords),
        "--chat needs an experiment on conversations (spmd.data.text.chat), whose chat template it uses; this"
        f" one reads {type(data).__name__}",
    )
    assert isinstance(data, ChatRecords)
    check(not options.prompt, "--chat reads lines from standard input: leave --prompt out")
    check(options.draw >= 0, f"--draw-seed {options.draw} must not be negative")
    check(options.tokens >= 0, f"--tokens {options.tokens} must not be negative")
    tokenizer = data.open_tokenizer()
    template = data.open_template(tokenizer)
    answer = _answers(exp, options, tokenizer, template)
    messages: list[dict[str, str]] = []
    # Of several processes the first reads all lines at once: the others do not wait for a person.
    several = agree.has_peers()
    lines = (
        agree.from_first(lambda: [*_lines()], "lines of standard input") if several else _lines()
    )
    for line in lines:
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ((ids, _),) = tokenizer.encode_marked([template.render(messages, prompt=True)])
        prompt = np.asarray(ids, np.int32)
        parts = []
        for text in stream(tokenizer, answer(prompt), prompt):
            parts.append(text)
            if agree.is_first():
                print(text, end="", flush=True)
        agree.say("")
        messages.append({"role": "assistant", "content": "".join(parts)})
    return 0


def _answers(
    exp: Experiment, options: SampleOptions, tokenizer: Tokenizer, template: ChatTemplate
) -> Callable[[np.ndarray], Iterator[int]]:
    """A function that yields the tokens of the answer to a prompt, without the one that ends it."""
    from spmd.cli.sample import MOST_TOKENS
    from spmd.data.text.chat.conversation import end_tokens
    from spmd.train import sample

    ends = end_tokens(template, tokenizer)
    choice = sample.Choice(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
    )
    snapshot = exp.restore(None if options.step < 0 else options.step, same=("tokenizer",))
    vocab = tokenizer.vocab_size
    steps = sample.Steps(snapshot, choice, options.draw, vocab)

    def answer(prompt: np.ndarray) -> Iterator[int]:
        remaining = sample.remaining_positions(snapshot, [prompt])
        tokens = sample.generate(
            snapshot,
            [prompt],
            num_tokens=min(options.tokens or MOST_TOKENS, remaining),
            choice=choice,
            seed=options.draw,
            vocab=vocab,
            steps=steps,
        )
        for (token,) in tokens:
            if int(token) in ends:
                return
            yield int(token)

    return answer


def _lines() -> Iterator[str]:
    """The lines of standard input; a person is asked for each."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
