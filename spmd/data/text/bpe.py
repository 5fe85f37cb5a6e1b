"""Byte-level BPE trained on a text: deterministic, kept in the cache by the text's content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spmd.core.fields import check
from spmd.data import cache as caches
from spmd.data import cache_root

PREFIX = "bpe:"
SPECIAL = (
    "</s>",
    "<mask>",
    "<cls>",
)  # ends a text; a hidden token; begins a text that is classified
LEAST = 256 + len(SPECIAL)
FILE = "tokenizer.json"


def vocab_of(name: str) -> int:
    """The size N of the vocabulary of the tokenizer `bpe:N`; ValueError for any other name."""
    digits = name.removeprefix(PREFIX)
    check(
        name.startswith(PREFIX) and digits.isdecimal() and int(digits) >= LEAST,
        f"data.tokenizer={name!r}: write bpe:N, with the number N of its tokens, at least {LEAST}"
        f" (256 bytes and {len(SPECIAL)} special tokens)",
    )
    return int(digits)


def train(texts: Iterable[str], vocab: int) -> str:
    """A Hugging Face tokenizer.json of at most `vocab` tokens (Sennrich et al. 2016, on bytes as GPT-2's).

    The same texts give the same file. Nothing is normalised: any text is decoded to itself.

    Args:
        texts: documents, read once.
        vocab: tokens, those of all 256 bytes and SPECIAL included.

    Returns:
        The file's text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)
    return tokenizer.to_str()


def cached(name: str, key: str, texts: Iterable[str], vocab: int, cache_dir: str) -> Path:
    """The file of the tokenizer of some text in the cache, trained where it is missing.

    Args:
        name: of the text, for the directory.
        key: identifies the text.
        texts: its documents.
        vocab: tokens.
        cache_dir: data.cache_dir.

    Returns:
        The path of a tokenizer.json.
    """
    import tokenizers

    digest = hashlib.sha256(
        repr((key, vocab, SPECIAL, tokenizers.__version__)).encode()
    ).hexdigest()
    cache = Path(cache_root(cache_dir)) / "tokenizers" / f"{name}-{vocab}-{digest[:16]}"

    def write(part: Path) -> dict[str, Any]:
        (part / FILE).write_text(train(texts, vocab), encoding="utf-8")
        return {"vocabulary": vocab}

    if not caches.read_facts(cache):
        caches.build(cache, write)
    return cache / FILE


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts; ValueError where there is none."""
    num = 0
    for text in texts:
        num += len(text)
        yield text
    check(num > 0, "a tokenizer is trained on text, and there is none")
