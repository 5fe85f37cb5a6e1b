"""Chat templates: conversations as text, rendered as transformers renders them.

A template is a program that comes with a checkpoint. It runs in the sandbox of jinja2, sees plain JSON values
alone, and reaches neither files nor modules.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spmd.core.fields import check
from spmd.data.text.chat.sandbox import CLOSE, OPEN, environment, first_line, import_jinja2

Message = dict[str, Any]
Span = tuple[int, int]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message


class Rendered(NamedTuple):
    """A conversation as text. spans: [start, end) in characters, what the assistant is to learn."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate:
    """A chat template and the special tokens that it writes.

    Args:
        source: the template, in Jinja.
        tokens: `{"eos_token": "</s>", ...}`.
        date: what strftime_now writes, as datetime.date.
        place: where it is from, for messages.

    Raises:
        ValueError: it is no template, or jinja2 is missing.
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], date: datetime.date, place: str
    ) -> None:
        self.source, self.tokens, self.place = source, dict(tokens), place
        jinja2 = import_jinja2()
        try:
            self._template = environment(date).from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{place} is no chat template: {first_line(error)}") from None
        self._marks = bool(GENERATION.search(source))
        dated = date.isoformat() if "strftime_now" in source else ""
        self.key = json.dumps([source, sorted(self.tokens.items()), dated])

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: with `role` and `content`.
            prompt: whether what begins the assistant's next message follows.

        Raises:
            ValueError: the template refuses them.
        """
        return self._render(messages, prompt).replace(OPEN, "").replace(CLOSE, "")

    def conversation(self, messages: Sequence[Message], first: int = 0) -> Rendered:
        """The text of a conversation, and what of it the assistant is to learn.

        That is what the template's `{% generation %}` blocks write; of a template without them, what it
        writes from the generation prompt of each of the assistant's messages to what closes that message.

        Args:
            messages: with `role` and `content`.
            first: earlier messages are context alone.

        Raises:
            ValueError: the template refuses them, or writes a message so that it cannot be found.
        """
        given = json.dumps(messages, ensure_ascii=False)
        check(OPEN not in given and CLOSE not in given, "it has the noncharacter U+FDD0 or U+FDD1")
        marked = self._render(messages, prompt=False)
        if self._marks:
            text, spans = _unmark(marked)
            # Those of the context come first, one for each message of the assistant.
            roles = [message["role"] for message in messages]
            before = roles[:first].count("assistant")
            check(not first or len(spans) == roles.count("assistant"), self._lost(first))
            return Rendered(text, spans[before:])
        numbers = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
        places = self._places(marked, messages, numbers)
        return Rendered(
            marked, tuple(self._span(marked, messages, i, places.get(i)) for i in numbers)
        )

    @functools.cached_property
    def turn_end(self) -> str:
        """The text that the template writes after the content of an assistant's message."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xyz"}]
        return self.render(probe).rpartition("xyz")[2]

    def _places(
        self, text: str, messages: Sequence[Message], numbers: Sequence[int]
    ) -> dict[int, Span]:
        """Where the contents of messages, without blanks around them, stand in the text of all."""
        given = [dict(message) for message in messages]
        numbers = [i for i in numbers if isinstance(given[i].get("content"), str)]
        for i in numbers:
            content = given[i]["content"]
            core = content.strip()
            given[i]["content"] = (
                content.replace(core, f"{OPEN}{core}{CLOSE}", 1) if core else content
            )
        numbers = [i for i in numbers if OPEN in given[i]["content"]]
        found, spans = _unmark(self._render(given, prompt=False))
        check(
            found == text and len(spans) == len(numbers),
            self._lost(numbers[0]) if numbers else "it has no text of the assistant",
        )
        return dict(zip(numbers, spans, strict=True))

    def _span(self, text: str, messages: Sequence[Message], index: int, place: Span | None) -> Span:
        """The part that counts of the message `index`, whose content stands at `place` in the text of all."""
        prefix = self.render(messages[:index], prompt=True)
        begins = len(prefix) if text.startswith(prefix) else None
        if place is None:  # calls of tools: the text up to what follows them
            through = self.render(messages[: index + 1])
            check(begins is not None and text.startswith(through), self._lost(index))
            return len(prefix), len(through)
        start, end = place
        if begins is not None and begins <= start:
            start = begins
        closing = self.turn_end.strip()
        rest = text[end:]
        after = len(rest) - len(rest.lstrip())
        check(rest.lstrip().startswith(closing), self._lost(index))
        return start, end + (after + len(closing) if closing else 0)

    def _lost(self, index: int) -> str:
        return (
            f"message {index + 1}, of the assistant, is not found in what the template writes: give a"
            " template that marks it by {% generation %}"
        )

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        jinja2 = import_jinja2()
        plain = json.loads(json.dumps([_with_reasoning(message) for message in messages]))
        options = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        try:
            return self._template.render(messages=plain, **options, **self.tokens)
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the chat template fails on it: {first_line(error)}") from None


def _unmark(marked: str) -> tuple[str, tuple[Span, ...]]:
    """The text without its marks, and the spans that they enclose."""
    parts: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for part in re.split(f"([{OPEN}{CLOSE}])", marked):
        if part == OPEN:
            start = length
        elif part == CLOSE:
            spans.append((start, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), tuple(spans)


def _with_reasoning(message: Message) -> Message:
    """A message with its reasoning under the names that templates read, as transformers 5 gives it."""
    reasoning = next((message[n] for n in REASONING if message.get(n) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
