"""Tokenizers: UTF-8 bytes, single characters, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spmd.core.fields import check, closest

Marked = tuple[np.ndarray, np.ndarray]  # ids uint32 [T], their characters [start, end) int64 [T, 2]
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # GPT-2, Llama 3, Llama 2, Gemma


class Tokenizer(Protocol):
    """Text <-> token ids below `vocab_size`. begin, end: tokens around a document, if there are any.

    special: tokens that are no text. end_text: how a chat template writes `end`. key: identifies the
    tokenizer; changes whenever the tokens of a text may.
    """

    vocab_size: int
    begin: int | None
    end: int | None
    end_text: str | None
    special: frozenset[int]
    key: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int [N], without begin and end. ValueError for unknown characters."""
        ...

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """The ids of each text, in which special tokens are written out, and the characters of each id."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without begin and end; invalid ids become U+FFFD."""
        ...

    def unsettled(self, token: int) -> bool:
        """Whether tokens after `token` may change the text before it."""
        ...


class Bytes:
    """The bytes of UTF-8. 255, which never occurs in UTF-8, ends a document: the vocabulary stays 256, which
    meshes divide.
    """

    vocab_size: int = 256
    begin: int | None = None

    def __init__(self, end: bool = True):
        self.end: int | None
        self.end = 255 if end else None
        self.end_text = ENDS[0] if end else None
        self.special = frozenset({255} if end else ())
        self.key = f"bytes {end}"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint8 ids."""
        return [np.frombuffer(t.encode("utf-8", "surrogatepass"), np.uint8) for t in texts]

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """`<|endoftext|>` is the end token."""
        return [self._encode_marked(text) for text in texts]

    def _encode_marked(self, text: str) -> Marked:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(text.split(self.end_text) if self.end_text else [text]):
            if number and self.end is not None and self.end_text:
                ids.append(self.end)
                spans.append((at, at + len(self.end_text)))
                at += len(self.end_text)
            for place, character in enumerate(part, at):
                encoded = character.encode("utf-8", "surrogatepass")
                ids += encoded
                spans += [(place, place + 1)] * len(encoded)
            at += len(part)
        return np.array(ids, np.uint32), np.array(spans, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Invalid UTF-8 becomes U+FFFD."""
        ids = np.asarray(ids, np.int64)
        return ids[ids < 255].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def unsettled(self, token: int) -> bool:
        """Never: the bytes of an incomplete character are a U+FFFD at the end."""
        del token
        return False


class Chars:
    """The characters of a text, sorted: nanoGPT's character level. A document has no end."""

    begin: int | None = None
    end: int | None = None
    end_text: str | None = None
    special: frozenset[int] = frozenset()

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        self.key = f"chars {characters}"
        self._codes = _codes(characters)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 ids."""
        return [self._encode(_codes(text)) for text in texts]

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """There are no special tokens."""
        spans = lambda text: np.stack([np.arange(len(text)), np.arange(1, len(text) + 1)], axis=1)
        return [(ids, spans(text)) for ids, text in zip(self.encode(texts), texts, strict=True)]

    def _encode(self, codes: np.ndarray) -> np.ndarray:
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        unknown = codes[self._codes[ids] != codes]
        if len(unknown):
            raise ValueError(
                f"the character {chr(unknown[0])!r} is not in the vocabulary of {self.vocab_size}:"
                f" {self.characters!r}"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids beyond the vocabulary become U+FFFD."""
        characters = self.characters
        return "".join(characters[i] if i < len(characters) else "\ufffd" for i in map(int, ids))

    def unsettled(self, token: int) -> bool:
        """Never: a token is a character."""
        del token
        return False


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class FromFile:
    """A Hugging Face tokenizer.json. Special tokens inside a text are encoded as plain text."""

    def __init__(self, path: str, end: str = "auto"):
        file = Path(path).expanduser()
        inside = sorted(p.name for p in file.glob("*.json")) if file.is_dir() else []
        check(
            not file.is_dir(),
            f"data.tokenizer={path!r} is a directory; give a tokenizer.json."
            f"{closest('tokenizer.json', inside) or f' It has no {path}/tokenizer.json'}",
        )
        check(
            file.is_file(),
            f"no tokenizer file {path!r}; give --data.tokenizer FILE (a Hugging Face tokenizer.json),"
            " or bytes, or chars",
        )
        import tokenizers

        content = file.read_bytes()
        try:
            tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self.path = str(file)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        affixes = tokenizer.encode("").ids  # tokens that the file's post-processor adds to a text
        tokenizer.encode_special_tokens = True
        self._inner = tokenizer
        self._marked: Any = tokenizers.Tokenizer.from_buffer(content)
        self._marked.no_truncation()
        self._marked.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end = self._end(path, vocabulary, end)
        self.end_text = None if self.end is None else tokenizer.id_to_token(self.end)
        self.begin = affixes[0] if affixes and affixes[0] != self.end else None
        self._special = {i for i in (self.begin, self.end) if i is not None}
        self.key = f"{hashlib.sha256(content).hexdigest()} {self.begin} {self.end}"

    @staticmethod
    def _end(path: str, vocabulary: dict[str, int], end: str) -> int | None:
        if end == "none":
            return None
        check(
            end == "auto" or end in vocabulary,
            f"data.end={end!r} is no token of {path}; give one of its tokens, auto or none",
        )
        names = ENDS if end == "auto" else (end,)
        return next((vocabulary[name] for name in names if name in vocabulary), None)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 ids; the texts are spread over the cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def encode_marked(self, texts: Sequence[str]) -> list[Marked]:
        """As transformers encodes the text of a chat template."""
        encodings = self._marked.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(e.ids, np.uint32), np.array(e.offsets, np.int64).reshape(-1, 2))
            for e in encodings
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids beyond the vocabulary are left out."""
        return self._inner.decode(
            [i for i in map(int, ids) if i not in self._special], skip_special_tokens=False
        )

    def unsettled(self, token: int) -> bool:
        """Whether it is a byte token of SentencePiece, of which several make a character."""
        return bool(_BYTE.fullmatch(self._inner.id_to_token(token) or ""))


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def load_tokenizer(name: str, end: str) -> Tokenizer:
    """The tokenizer `bytes`, or that of a file; end: auto, none, or the token that ends a document."""
    if name != "bytes":
        return FromFile(name, end)
    check(end in ("auto", "none"), f"data.end={end!r}: with data.tokenizer=bytes give auto or none")
    return Bytes(end == "auto")
