"""Documents of text files, JSONL files or a TFDS text set -> one array of tokens, cached on disk."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from spmd.data import TFDS, cache_root, tfds
from spmd.data import cache as caches
from spmd.data.tokenizer import Chars, Tokenizer
from spmd.fields import check, closest

FORMAT = 1  # raised when the same documents would give other tokens
_PIECE = 2**18  # characters: longer text files are encoded in pieces, on all cores
_CHUNK = 2**22  # characters encoded at once
_LARGE = 2**26  # bytes of input, from which progress is shown


class Piece(NamedTuple):
    """Text of a document, or one part of a long one. done: bytes of the input read by then."""

    text: str
    first: bool
    last: bool
    done: int


class Documents(NamedTuple):
    """name: for people. key: what the content is known by. size: bytes of input."""

    name: str
    key: str
    size: int
    pieces: Callable[[], Iterator[Piece]]


class Tokens(NamedTuple):
    """tokens [N] uint16 or uint32; starts int64 [D]: where each document begins."""

    tokens: np.ndarray
    starts: np.ndarray


# ---- documents


def of_files(globs: Sequence[str], field: str, option: str) -> Documents:
    """Files that match `globs`: a line of a JSONL file is a document, another file is one."""
    found: dict[str, None] = {}
    for pattern in globs:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        matches = [m for m in matches if os.path.isfile(m)]
        check(
            bool(matches),
            f"no file matches {option}={pattern!r} (looked from {os.getcwd()}); give text or JSONL"
            " files or globs, in quotes",
        )
        found |= dict.fromkeys(matches)
    stats = [os.stat(f) for f in found]
    key = [f"{f} {s.st_size} {s.st_mtime_ns}" for f, s in zip(found, stats, strict=True)]

    def pieces() -> Iterator[Piece]:
        before = 0
        for file, stat in zip(found, stats, strict=True):
            yield from _read(file, field, before)
            before += stat.st_size

    name = Path(next(iter(found))).name.split(".")[0]
    return Documents(name, repr((key, field)), sum(s.st_size for s in stats), pieces)


def _read(file: str, field: str, before: int) -> Iterator[Piece]:
    try:
        with open(file, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw
            text = io.TextIOWrapper(stream, "utf-8", newline="")  # the file's own line ends
            done = lambda: before + raw.tell()
            if re.search(r"\.(jsonl|ndjson|json)(\.gz)?$", file):
                yield from _lines(file, text, field, done)
            else:
                yield from _parts(text, done)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None


def _lines(file: str, text: TextIO, field: str, done: Callable[[], int]) -> Iterator[Piece]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is not JSON: {error}") from None
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str):
            known = list(record) if isinstance(record, dict) else []
            raise ValueError(
                f"{file}, line {number} has no text {field!r} (data.field).{closest(field, known)}"
                f" It has: {', '.join(known) or 'no fields'}"
            )
        yield Piece(value, True, True, done())


def _parts(text: TextIO, done: Callable[[], int]) -> Iterator[Piece]:
    """A long text cut before lines that begin with no blank: tokenizers do not reach across that."""
    first, held = True, ""
    while more := text.read(_PIECE):
        held += more
        cut = len(held)
        while (cut := held.rfind("\n", 0, cut)) > 0:
            if cut + 1 < len(held) and not held[cut + 1].isspace():
                break
        if cut <= 0 and len(held) >= _CHUNK:
            cut = len(held) - 2  # one line of millions of characters is cut anywhere
        if cut > 0 and len(held) >= _PIECE:
            yield Piece(held[: cut + 1], first, False, done())
            first, held = False, held[cut + 1 :]
    yield Piece(held, first, True, done())


def of_tfds(config: TFDS, splits: str, field: str) -> Documents:
    """The texts of a prepared TFDS set, an example is a document; splits: `train[:90%]+test`."""
    parts = [tfds.locate(config, split) for split in splits.split("+")]
    key = [(tfds.fingerprint(p.directory, p.name), *p[1:]) for p in parts]
    files = [f for p in parts for f in p.directory.glob(f"*-{p.name}.*")]

    def pieces() -> Iterator[Piece]:
        done = 0
        for part in parts:
            reader = tfds.reader(config, part.directory, part.name, [field])
            for at in range(part.start, part.stop, 256):
                with tfds.quiet():
                    examples = reader.__getitems__(list(range(at, min(at + 256, part.stop))))
                for example in examples:
                    value = example[field]
                    check(
                        isinstance(value, bytes | str),
                        f"feature {field!r} of {config.name!r} is no text (data.field)",
                    )
                    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
                    done += len(value)
                    yield Piece(text, True, True, done)

    name, _, _ = tfds.parse_name(config.name)
    return Documents(name, repr((key, field)), sum(f.stat().st_size for f in files), pieces)


# ---- what is kept of them


def characters(documents: Sequence[Documents], cache_dir: str) -> Chars:
    """The character tokenizer over all of `documents`; its vocabulary is kept in the cache."""
    cache = _cache(documents[0].name, [d.key for d in documents], "characters", cache_dir)
    file = "characters.json"

    def write(part: Path) -> dict[str, Any]:
        found: set[str] = set()
        for one in documents:
            for piece in one.pieces():
                found.update(piece.text)
        check(bool(found), f"the text {documents[0].name} is empty")
        (part / file).write_text(json.dumps("".join(sorted(found))))
        return {"characters": len(found)}

    if not caches.facts(cache):
        caches.build(cache, write)
    return Chars(json.loads((cache / file).read_text()))


def tokens(documents: Documents, tokenizer: Tokenizer, cache_dir: str) -> Tokens:
    """The tokens of all documents, one after the other, mapped from the cache; made when not there."""
    cache = _cache(documents.name, [documents.key], tokenizer.key, cache_dir)
    if not caches.facts(cache):
        caches.build(cache, lambda part: _write(part, documents, tokenizer))
    # A mapping of no bytes is refused.
    load = lambda name, mode: np.load(cache / name, mmap_mode=mode, allow_pickle=False)
    return Tokens(
        load("tokens.npy", "r" if caches.facts(cache)["tokens"] else None),
        load("starts.npy", None),
    )


def _cache(name: str, keys: Sequence[str], tokenizer: str, cache_dir: str) -> Path:
    digest = hashlib.sha256(repr((FORMAT, list(keys), tokenizer)).encode("utf-8", "surrogatepass"))
    return Path(cache_root(cache_dir)) / "tokens" / f"{name}-{digest.hexdigest()[:16]}"


def _write(part: Path, documents: Documents, tokenizer: Tokenizer) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    show = caches.progress(f"tokenizing {documents.name}", documents.size, large=_LARGE)
    begin, end = (
        np.array([] if i is None else [i], dtype) for i in (tokenizer.begin, tokenizer.end)
    )
    lengths = [0]  # of the documents; the last is not at its end
    with (part / "tokens.npy").open("wb") as out:
        head = _header(out, dtype, 0)
        for chunk in _chunks(documents.pieces()):
            encoded = tokenizer.encode([piece.text for piece in chunk])
            for piece, ids in zip(chunk, encoded, strict=True):
                whole = np.concatenate(
                    [*[begin] * piece.first, ids.astype(dtype), *[end] * piece.last]
                )
                out.write(whole.tobytes())
                lengths[-1] += len(whole)
                if piece.last:
                    lengths.append(0)
            show(chunk[-1].done)
        out.seek(0)
        assert _header(out, dtype, sum(lengths)) == head  # the length has room in the header
    ends = np.cumsum([n for n in lengths if n], dtype=np.int64)
    np.save(part / "starts.npy", np.concatenate([[0], ends[:-1]]) if len(ends) else ends)
    return {"tokens": sum(lengths), "documents": len(ends), "vocabulary": tokenizer.vocab_size}


def _header(out: Any, dtype: np.dtype, num: int) -> int:
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num,)}
    np.lib.format.write_array_header_1_0(out, shape)
    return out.tell()


def _chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces gathered to about _CHUNK characters; documents without text are left out."""
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        if piece.first and piece.last and not piece.text:
            continue
        chunk.append(piece)
        size += len(piece.text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
