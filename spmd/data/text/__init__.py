"""Data configs of language models: text or JSONL files, TFDS text sets, weighted mixtures of them.

A batch has `tokens`, `targets`, `segments`, `positions`, int32 [B, T]. Documents are packed one after the
other: `segments` numbers those of a row from 1 on, 0 is padding; `positions` restart at 0 in each; `targets`
is the next token of the same document, -1 where there is none. An end-of-document token belongs to its
document, and is predicted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import tyro

from spmd.core.fields import check, free, located
from spmd.data import TFDS, DataConfig, Features, Split
from spmd.data.mixing import Schedule, TurnsByStep, check_schedule, check_weights
from spmd.data.text.tokenized import check_vocab

if TYPE_CHECKING:
    from spmd.data import Source
    from spmd.data.content import Content
    from spmd.data.text.corpus import Documents, Tokens
    from spmd.data.text.tokenizer import Tokenizer
    from spmd.data.text.windows import Mixed, Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences(DataConfig):
    """Fields that all text data shares: tokenizer and sequence length."""

    sequence_length: int = 1024
    """Tokens of one example."""
    tokenizer: str = located("bytes")
    """bytes (UTF-8), chars (the characters of the text), or a file: a Hugging Face tokenizer.json."""
    end: str = "auto"
    """Token that ends a document: auto (the tokenizer's own, where it has one), none, or its text."""
    stride: int = 0
    """Tokens between the starts of two training windows; 0 is sequence_length: they do not overlap."""
    dir: str = free("")
    """TFDS data directory; empty is $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    cache_dir: str = free("")
    """Cache of tokens; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""
    features: tyro.conf.Suppress[Features] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 1), ("stride", 0)):
            value = getattr(self, name)
            check(value >= least, f"data.{name}={value} must be at least {least}")
        check(
            self.stride <= self.sequence_length,
            f"data.stride={self.stride} must be at most data.sequence_length={self.sequence_length}:"
            " tokens between the windows would never be read",
        )
        shape = ((self.sequence_length,), "int32")
        names = ("tokens", "targets", "segments", "positions")
        object.__setattr__(self, "features", dict.fromkeys(names, shape))
        super().__post_init__()

    def texts(self) -> list[Text]:
        """The texts that are read."""
        raise NotImplementedError

    def tokenizer_content(self) -> Content:
        """The tokenizer's file, or the characters of the text."""
        from spmd.data.content import Entry

        tokenizer = self.open_tokenizer()
        digest = hashlib.sha256(tokenizer.key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        kind = self.tokenizer if self.tokenizer in ("bytes", "chars") else "file"
        return [Entry(f"{kind} of {tokenizer.vocab_size} tokens", 0, digest)]

    def check_model(self, model: Any) -> None:
        """ValueError when the model has fewer tokens than the tokenizer, or takes shorter sequences.

        More are allowed: tables are padded to what devices divide, and `sample` never draws the rest.
        """
        length, vocab = (getattr(model, name, None) for name in ("length", "vocab"))
        check(
            length is None or self.sequence_length <= length,
            f"data.sequence_length={self.sequence_length} is more than model.length={length}; lower one"
            " or raise the other",
        )
        if vocab is None:
            return
        check_vocab(vocab, self.open_tokenizer().vocab_size, self.tokenizer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Sequences):
    """Text of files or of a TFDS set."""

    files: tuple[str, ...] = located(())
    """Text, JSONL or Parquet files, or globs in quotes; a line, a row or a text file is a document."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on; without any, eval_fraction."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """Format of the files: by their suffix, or one for all."""
    name: str = ""
    """Instead of files, a TFDS set: `tiny_shakespeare`, `name/config:version`."""
    train_split: str = "train"
    """TFDS split to train on; slices as in TFDS, several with +: train[:90%%]+test."""
    eval_split: str = ""
    """TFDS split to evaluate on; empty is eval_fraction."""
    field: str = "text"
    """Field of JSONL files, column of Parquet files, or feature of the TFDS set, that holds the text."""
    eval_fraction: float = 0.1
    """Fraction of the tokens, at the end, for evaluation where no other text is named for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not (self.files and self.name),
            f"both data.files={self.files} and data.name={self.name!r} are given; give one of them",
        )
        check(
            0 < self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} must be between 0 and 1",
        )

    def texts(self) -> list[Text]:
        """This one."""
        return [self]

    def tfds(self) -> TFDS:
        """The TFDS set by itself."""
        return TFDS(name=self.name, dir=self.dir, cache_dir=self.cache_dir)

    def documents(self) -> dict[Split, Documents]:
        """The documents of each split; `eval` is absent when it is a part of the training text."""
        from spmd.data.text import corpus

        check(
            bool(self.files or self.name),
            "no text is named; give --data.files 'DIR/*.jsonl' (or text files), or --data.name NAME, a"
            " TFDS set",
        )
        if self.files:
            splits = {"train": self.files, "eval": self.eval_files}
            options = {"train": "data.files", "eval": "data.eval_files"}
            read = lambda globs, option: corpus.file_documents(
                globs, self.field, option, self.format, self.cache_dir
            )
            documents = {s: read(g, options[s]) for s, g in splits.items() if g}
        else:
            splits = {"train": self.train_split, "eval": self.eval_split}
            documents = {
                s: corpus.tfds_documents(self.tfds(), g, self.field) for s, g in splits.items() if g
            }
        return documents  # type: ignore[return-value]

    def texts_of(self, split: Split) -> Iterator[str]:
        """The documents of a split, long ones in pieces, those that cannot be read left out."""
        documents = self.documents()
        pieces = documents.get(split, documents["train"]).pieces()
        return (piece.text for piece in pieces if not piece.bad)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer; `chars` has the characters of all text, evaluation included, as in nanoGPT."""
        from spmd.data.text import corpus
        from spmd.data.text.tokenizer import load_tokenizer

        if self.tokenizer != "chars":
            return load_tokenizer(self.tokenizer, self.end)
        check(self.end in ("auto", "none"), f"data.end={self.end!r}: with chars give auto or none")
        return corpus.character_tokenizer(
            list(self.documents().values()), self.cache_dir, self.skip_bad
        )

    def open(self, split: Split) -> Windows:
        """Windows over the tokens, mapped from the cache. ValueError when the text does not fill one."""
        from spmd.data.text.windows import Windows

        text = self._tokens(split)
        # Evaluation text may be short: its only window is padded.
        least = self.sequence_length + 1 if split == "train" else 2
        check(
            len(text.tokens) >= least,
            f"the {split} text has {len(text.tokens)} tokens, too few to fill a sequence of"
            f" data.sequence_length={self.sequence_length} and its targets{self._note_gaps(text)}; give"
            " more text or a smaller sequence_length",
        )
        stride = self.stride if split == "train" else 0
        return Windows(text.tokens, text.starts, self.sequence_length, stride, text.bad)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files; those of training where evaluation has none of its own."""
        del source
        documents = self.documents()
        return documents.get(split, documents["train"]).content

    def _note_gaps(self, text: Tokens) -> str:
        """A note on empty files and bad records, for a message."""
        from spmd.data.text.corpus import shorten_list

        empty = [name for documents in self.documents().values() for name in documents.empty]
        note = f" (without a byte: {shorten_list(empty)})" if empty else ""
        return note + (f" (bad records: {shorten_list(text.bad)})" if text.bad else "")

    def _tokens(self, split: Split) -> Tokens:
        from spmd.data.text import corpus
        from spmd.data.text.windows import slice_tokens

        tokenizer, documents = self.open_tokenizer(), self.documents()
        if "eval" in documents:
            return corpus.tokenize(documents[split], tokenizer, self.cache_dir, self.skip_bad)
        text = corpus.tokenize(documents["train"], tokenizer, self.cache_dir, self.skip_bad)
        num = len(text.tokens)
        cut = int(num * (1 - self.eval_fraction))
        bounds = (0, cut) if split == "train" else (cut, num)
        tokens, starts = slice_tokens(text.tokens, text.starts, *bounds)
        return corpus.Tokens(tokens, starts, text.bad)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Sequences):
    """Several texts, read in turn by weight.

    After any number of examples each part is within one example of its share; the windows of each part are
    shuffled by themselves, and repeated as its share requires. Evaluation reads that of all parts once.
    """

    parts: tyro.conf.Suppress[tuple[Text, ...]]
    """The texts; sequence_length, tokenizer, end, stride, cache_dir and skip_bad are those of the mixture."""
    weights: tuple[float, ...]
    """Share of the examples for each part; they need not add up to one."""
    schedule: tyro.conf.Suppress[Schedule] = ()
    """Other weights from later steps on: ((first step, weights), ...); 0 leaves a part out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights, len(self.parts))
        check_schedule(self.schedule, len(self.parts))
        TurnsByStep(self.weights, self.schedule, self.batch_size)  # refuses shares of many digits
        check(
            self.tokenizer != "chars" or len(self.parts) == 1,
            "data.tokenizer=chars has one vocabulary for one text; a mixture needs bytes or a file",
        )

    def texts(self) -> list[Text]:
        """The parts as they are read."""
        shared = {
            name: getattr(self, name)
            for name in ("sequence_length", "tokenizer", "end", "stride", "cache_dir", "skip_bad")
        }
        return [
            dataclasses.replace(text, **shared, dir=text.dir or self.dir) for text in self.parts
        ]

    def open_tokenizer(self) -> Tokenizer:
        """That of all parts."""
        return self.texts()[0].open_tokenizer()

    def open(self, split: Split) -> Mixed:
        """The windows of all parts; in training their order is the mixture."""
        from spmd.data.cache import BadRecords
        from spmd.data.text.windows import Mixed

        turns = TurnsByStep(self.weights, self.schedule, self.batch_size)
        source = Mixed([text.open(split) for text in self.texts()], turns)
        bad = BadRecords(self.skip_bad)
        for reason in source.skipped:
            bad.add(reason)
        return source

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files of all parts, part by part."""
        return [
            entry._replace(name=f"{i}: {entry.name}")
            for i, text in enumerate(self.texts())
            for entry in text.content(split, source)
        ]
