"""The base of data configs of short texts: records of files or of the experiment, one tokenizer for all."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tyro

from spmd.core.fields import check, free, located
from spmd.data import DataConfig, Source, Split

if TYPE_CHECKING:
    from spmd.data.content import Content
    from spmd.data.text.records import Records
    from spmd.data.text.tokenizer import Tokenizer

Rows = Sequence[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizedRecords(DataConfig):
    """Fields that data of short texts shares: its records and their tokenizer.

    A subclass says which columns are read (`columns`), and which of them are text.
    """

    files: tuple[str, ...] = located(())
    """Files with a record each line or row, or globs in quotes: .parquet, .jsonl, .tsv, .csv."""
    eval_files: tuple[str, ...] = located(())
    """Files to evaluate on."""
    made: tyro.conf.Suppress[Callable[[Split], Rows] | None] = None
    """Records of the experiment file, (split) -> [(value of each column)]; read where no files are named."""
    tokenizer: str = located("bytes")
    """bytes (UTF-8), bpe:N (of N tokens, trained on the training text), or a file: a tokenizer.json."""
    end: str = "auto"
    """Token that ends a text: auto (the tokenizer's own), or its text."""
    cache_dir: str = free("")
    """Cache of tokens and tokenizers; empty is $SPMD_CACHE_DIR, else ~/.cache/spmd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.tokenizer != "chars",
            "data.tokenizer=chars has no token that ends a text; give bytes, bpe:N or a file",
        )
        check(
            not self.eval_files or bool(self.files),
            "data.eval_files are given without data.files; give both, or neither",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are read."""
        raise NotImplementedError

    @property
    def num_texts(self) -> int:
        """How many of the columns, the first ones, are text that the tokenizer encodes."""
        return 1

    def records(self, split: Split) -> Records:
        """The records of a split; ValueError where none are named."""
        from spmd.data.text import records

        if self.files:
            named = self.files if split == "train" else self.eval_files
            option = "data.files" if split == "train" else "data.eval_files"
            check(bool(named), f"{option} is empty; give the files to evaluate on")
            return records.from_columns(
                named, self.columns, option, self.cache_dir, partial=self.partial
            )
        check(
            self.made is not None,
            "no text is named; give --data.files FILE ... and --data.eval-files FILE ...",
        )
        assert self.made is not None
        return records.from_memory(f"made-{split}", self.made(split))

    @property
    def partial(self) -> bool:
        """Whether a record may lack columns, whose values are then None."""
        return False

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of all texts, trained where it is missing."""
        from spmd.data.text import bpe
        from spmd.data.text.tokenizer import load_tokenizer

        name = self.tokenizer
        if name.startswith(bpe.PREFIX):
            records, vocab = self.records("train"), bpe.vocab_of(name)
            name = str(
                bpe.cached(records.name, records.key, self.texts_of("train"), vocab, self.cache_dir)
            )
        return load_tokenizer(name, self.end)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer of all texts; ValueError for one without a token that ends a text."""
        tokenizer = self.load_tokenizer()
        check(
            tokenizer.end is not None,
            f"data.tokenizer={self.tokenizer} has no token that ends a text; give --data.end TOKEN, one of"
            " its tokens",
        )
        return tokenizer

    def texts_of(self, split: Split) -> Iterator[str]:
        """The texts of a split, those of one record after the other."""
        for record in self.records(split).read():
            values = record.values[: self.num_texts]
            yield from (value for value in values if isinstance(value, str))

    def tokenizer_content(self) -> Content:
        """The tokenizer."""
        from spmd.data.content import Entry

        tokenizer = self.open_tokenizer()
        digest = hashlib.sha256(tokenizer.key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return [Entry(f"{tokenizer.vocab_size} tokens", 0, digest)]

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files, or the records that the experiment makes."""
        del source
        return self.records(split).content

    def check_model(self, model: Any) -> None:
        """ValueError when the model has fewer tokens than the tokenizer."""
        vocab = getattr(model, "vocab", None)
        if vocab is not None:
            check_vocab(vocab, self.open_tokenizer().vocab_size, self.tokenizer)


def check_vocab(vocab: int, size: int, tokenizer: str) -> None:
    """ValueError when a model of `vocab` tokens has fewer than the `size` of its tokenizer.

    More are allowed: tables are padded to what devices divide, and `sample` never draws the rest.
    """
    padded = -(-size // 128) * 128
    hint = f" or, padded for the devices, {padded}" if padded > size else ""
    check(
        vocab >= size,
        f"model.vocab={vocab} is less than the {size} tokens of data.tokenizer={tokenizer}; use"
        f" --model.vocab {size}{hint}, or the tokenizer that the model was made for",
    )
