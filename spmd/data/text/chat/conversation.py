"""Conversations of records: their messages, checked, and their tokens, with those that count in the loss."""

# T tokens of a conversation

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from spmd.core.fields import closest
from spmd.data.text.chat.template import ChatTemplate, Message, Rendered
from spmd.data.text.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")


class Conversation(NamedTuple):
    """Messages; the loss is on the assistant's from the number `first` on."""

    messages: list[Message]
    first: int = 0


class TokenizedChat(NamedTuple):
    """ids_T: tokens. counts_T: whether a token is in the loss, as a target."""

    ids_T: np.ndarray
    counts_T: np.ndarray


def read_messages(value: Any, role: str, name: str) -> list[Message]:
    """The messages of a column's value; ValueError, with the reason, where there are none.

    Args:
        value: a list of messages, or the text of one.
        role: whose text it is.
        name: of the column.
    """
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list | tuple):
        kind = type(value).__name__
        raise ValueError(f"{name} is {kind}, and should be a list of messages, or a text")
    return [_read_message(message, f"message {i} of {name}") for i, message in enumerate(value, 1)]


def read_conversation(messages: Any, prompt: Any, completion: Any) -> Conversation:
    """The conversation of a record; ValueError, with the reason, where it is none.

    Args:
        messages: a list of messages; or None with
        prompt: what comes before, a text of the user's or messages; and
        completion: what is learned, a text of the assistant's or messages.
    """
    if messages is None and (prompt is None or completion is None):
        raise ValueError("it has neither messages, nor prompt and completion")
    if messages is not None:
        found = read_messages(messages, "user", "messages")
        first = 0
    else:
        before = read_messages(prompt, "user", "prompt")
        found = [*before, *read_messages(completion, "assistant", "completion")]
        first = len(before)
    roles = [message["role"] for message in found]
    if "assistant" not in roles[first:]:
        raise ValueError("it has no message of the assistant, which the loss is on")
    return Conversation(found, first)


def read_preference(prompt: Any, chosen: Any, rejected: Any) -> tuple[Conversation, Conversation]:
    """The conversations with the chosen answer and with the rejected one; ValueError, with the reason, where
    a record is none.

    Args:
        prompt: what comes before both, a text of the user's or messages; None where `chosen` and `rejected`
            are whole conversations, which begin with it.
        chosen: the preferred answer, a text of the assistant's or messages.
        rejected: the other one.
    """
    if chosen is None or rejected is None:
        raise ValueError("it has not both chosen and rejected answers")
    if prompt is None:
        both = [
            read_messages(x, "assistant", name)
            for x, name in ((chosen, "chosen"), (rejected, "rejected"))
        ]
        same = [a == b for a, b in zip(*both, strict=False)]
        first = same.index(False) if False in same else len(same)
        prompt, (chosen, rejected) = both[0][:first], (each[first:] for each in both)
        if not prompt:
            raise ValueError("it has no prompt, and chosen and rejected begin with none")
    pair = tuple(read_conversation(None, prompt, answer) for answer in (chosen, rejected))
    if pair[0] == pair[1]:
        raise ValueError("its chosen and rejected answers are the same")
    return pair[0], pair[1]


def encode(rendered: Rendered, tokenizer: Tokenizer) -> TokenizedChat:
    """Tokens of a conversation; those that touch a span count, and all between its first and last."""
    ((ids_T, offsets_T2),) = tokenizer.encode_marked([rendered.text])
    counts_T = np.zeros(len(ids_T), bool)
    for start, end in rendered.spans:
        touch = np.flatnonzero((offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start))
        if len(touch):
            counts_T[touch[0] : touch[-1] + 1] = True
    return TokenizedChat(ids_T, counts_T)


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer
) -> TokenizedChat:
    """Tokens of a conversation; ValueError, with the reason, where the template refuses it."""
    return encode(template.conversation(*conversation), tokenizer)


def end_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a turn: the first special one that the template writes after a message of the
    assistant, the end of a text, and the one that the tokenizer's configuration names.
    """
    texts = [template.turn_end, template.tokens.get("eos_token", "")]
    ends = set() if tokenizer.end is None else {tokenizer.end}
    for ids, _ in tokenizer.encode_marked(texts):
        special = [int(token) for token in ids if int(token) in tokenizer.special]
        ends |= set(special[:1])
    return ends


def _read_message(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {type(message).__name__}, and should have role and content")
    message = {k: v for k, v in message.items() if v is not None}  # Parquet fills in what is absent
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(
            f"{place} has the role {role!r}; known are {', '.join(ROLES)}.{closest(str(role), ROLES)}"
        )
    calls = bool(message.get("tool_calls"))
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{place} has parts that are not text")
    elif not isinstance(content, str) and not (content is None and calls):
        raise ValueError(f"{place} has no text as its content")
    said = content.strip() if isinstance(content, str) else content
    if role == "assistant" and not calls and not said:
        raise ValueError(f"{place}, of the assistant, is empty")
    try:
        return json.loads(json.dumps({"content": content, **message}))
    except (TypeError, ValueError):
        raise ValueError(f"{place} holds values that are not JSON") from None
