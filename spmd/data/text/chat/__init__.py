"""Data configs of conversations, by the chat template of their tokenizer: to imitate, or to prefer.

A batch has `tokens`, `targets`, `segments`, `positions`, int32 [B, T], as that of a text has them; `targets`
are -1 but for what the assistant says.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from spmd.core.fields import check, located
from spmd.data import Split
from spmd.data.text.tokenized import TokenizedRecords

if TYPE_CHECKING:
    from spmd.data.content import Content
    from spmd.data.text.chat.conversation import TokenizedChat
    from spmd.data.text.chat.rows import PackedSequences
    from spmd.data.text.chat.template import ChatTemplate
    from spmd.data.text.records import Record
    from spmd.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecords(TokenizedRecords):
    """Fields that data of conversations shares: the template, and the length of a row."""

    template: str = located("")
    """Chat template: empty is the tokenizer's own; a file; or plain, raw, chatml, for one without."""
    date: str = "2024-07-26"
    """Date that a template is told where it asks for today's: YYYY-MM-DD; or today."""
    sequence_length: int = 1024
    """Tokens of a row."""

    def __post_init__(self) -> None:
        least = f"data.sequence_length={self.sequence_length} must be at least 2"
        check(self.sequence_length >= 2, least)
        names = ("tokens", "targets", "segments", "positions")
        row = ((self.sequence_length,), "int32")
        object.__setattr__(self, "features", dict.fromkeys(names, row))
        super().__post_init__()

    @property
    def partial(self) -> bool:
        """A record may lack columns."""
        return True

    def open_template(self, tokenizer: Tokenizer) -> ChatTemplate:
        """The chat template; ValueError where there is none."""
        from spmd.data.text.chat.load import load_template

        return load_template(self.tokenizer, self.template, self.date, tokenizer.end_text)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer, whose end token the chat template does not need."""
        return self.load_tokenizer()

    def texts_of(self, split: Split) -> Iterator[str]:
        """The texts of all messages of a split."""
        for record in self.records(split).read():
            for value in record.values:
                if isinstance(value, str):
                    yield value
                for message in value if isinstance(value, list | tuple) else ():
                    content = message.get("content") if isinstance(message, dict) else None
                    if isinstance(content, str):
                        yield content

    def tokenizer_content(self) -> Content:
        """The tokenizer and its chat template."""
        from spmd.data.content import Entry

        tokenizer = self.open_tokenizer()
        key = tokenizer.key + self.open_template(tokenizer).key
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return [Entry(f"{tokenizer.vocab_size} tokens and a chat template", 0, digest)]

    def check_model(self, model: Any) -> None:
        """ValueError when the model has fewer tokens than the tokenizer, or takes shorter sequences."""
        length = getattr(model, "length", None)
        check(
            length is None or self.sequence_length <= length,
            f"data.sequence_length={self.sequence_length} is more than model.length={length}; lower one"
            " or raise the other",
        )
        super().check_model(model)

    def encoded(
        self, record: Record, template: ChatTemplate, tokenizer: Tokenizer
    ) -> list[TokenizedChat]:
        """The token sequences of a record; ValueError, with the reason, where it has none."""
        raise NotImplementedError

    def open_rows(self, split: Split, *, packed: bool, cut: bool) -> PackedSequences:
        """The rows of a split; ValueError where there is none."""
        from spmd.data.text.chat import rows

        records, tokenizer = self.records(split), self.open_tokenizer()
        template = self.open_template(tokenizer)
        options = {"packed": packed, "cut": cut}
        source = rows.open_rows(
            records,
            functools.partial(self.encoded, template=template, tokenizer=tokenizer),
            (type(self).__name__, self.columns, tokenizer.key, template.key),
            self.sequence_length,
            cache_dir=self.cache_dir,
            skip_bad=self.skip_bad,
            **options,
        )
        check(
            len(source) > 0,
            f"the {split} split has no conversation of at most data.sequence_length={self.sequence_length}"
            f" tokens ({source.longer} are longer); raise it",
        )
        return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(ChatRecords):
    """Conversations to imitate: messages, or a prompt and its completion; several share a row.

    A prompt or completion that is a text is a message of the user or of the assistant.
    """

    messages_column: str = "messages"
    """Column of the conversations: lists of messages with role and content."""
    prompt_column: str = "prompt"
    """Instead of messages, column of what comes before: a text, or messages."""
    completion_column: str = "completion"
    """Column of what is learned: a text, or messages."""
    longer: Literal["leave", "cut"] = "leave"
    """Conversations that are longer than a row: leave them out, or cut them."""
    packed: bool = True
    """Several conversations in a row, as many as fit, none of which attends to another; else one."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Messages, prompt, completion."""
        return (self.messages_column, self.prompt_column, self.completion_column)

    def encoded(
        self, record: Record, template: ChatTemplate, tokenizer: Tokenizer
    ) -> list[TokenizedChat]:
        """The tokens of the record's conversation."""
        from spmd.data.text.chat.conversation import encode_conversation, read_conversation

        conversation = read_conversation(*record.values)
        return [encode_conversation(conversation, template, tokenizer)]

    def open(self, split: Split) -> PackedSequences:
        """Rows of conversations, mapped from the cache."""
        return self.open_rows(split, packed=self.packed, cut=self.longer == "cut")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences(ChatRecords):
    """A prompt with the answer that is preferred and one that is not: a row is a pair.

    Segment 1 is the prompt with the chosen answer, segment 2 with the rejected one.
    """

    prompt_column: str = "prompt"
    """Column of what comes before both: a text, or messages."""
    chosen_column: str = "chosen"
    """Column of the preferred answer: a text, or messages."""
    rejected_column: str = "rejected"
    """Column of the other answer."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Prompt, chosen, rejected."""
        return (self.prompt_column, self.chosen_column, self.rejected_column)

    def encoded(
        self, record: Record, template: ChatTemplate, tokenizer: Tokenizer
    ) -> list[TokenizedChat]:
        """The tokens with the chosen answer, and those with the rejected one."""
        from spmd.data.text.chat.conversation import encode_conversation, read_preference

        pair = read_preference(*record.values)
        return [encode_conversation(each, template, tokenizer) for each in pair]

    def open(self, split: Split) -> PackedSequences:
        """Rows of pairs, mapped from the cache; a pair that is longer than a row is left out."""
        return self.open_rows(split, packed=False, cut=False)
