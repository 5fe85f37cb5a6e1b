"""Documents of text files, JSONL files or a TFDS text set -> one array of tokens, cached on disk."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spmd.core.fields import check
from spmd.core.storage import is_remote, json_text
from spmd.data import TFDS, cache_root, content, formats, tfds
from spmd.data import cache as caches
from spmd.data.builders import EMBEDDED
from spmd.data.content import Content
from spmd.data.formats import Piece
from spmd.data.text.tokenizer import Chars, Tokenizer

FORMAT = 2  # raised when the same documents would give other tokens
_LARGE = 2**26  # bytes of input, from which progress is shown


class Documents(NamedTuple):
    """The documents of a data set.

    name: for messages. key: identifies the content in the cache. size: bytes of input. pieces: reads them.
    content: identifies the content in a run. empty: names of empty files.
    """

    name: str
    key: str
    size: int
    pieces: Callable[[], Iterator[Piece]]
    content: Content
    empty: tuple[str, ...] = ()


class Tokens(NamedTuple):
    """tokens [N] uint16 or uint32; starts int64 [D]: where documents begin; bad: reasons of bad documents."""

    tokens: np.ndarray
    starts: np.ndarray
    bad: tuple[str, ...] = ()


# ---- documents


def file_documents(
    globs: Sequence[str], field: str, option: str, form: str = "auto", cache_dir: str = ""
) -> Documents:
    """Documents of the files that match `globs`: the lines of JSONL files, the rows of
    Parquet files, and each text file.

    form: data.format. ValueError where a pattern matches no file, and for a file in an unknown format.
    """
    files = matching_files(globs, option)
    forms = [formats.recognise(f, form) for f in files]
    content_entries = content.describe_files(files, cache_dir)
    # The time of modification shows a change in the middle of a file.
    times = [os.stat(f).st_mtime_ns for f in files]
    key = [(*e, t) for e, t in zip(content_entries, times, strict=True)]

    def pieces() -> Iterator[Piece]:
        offset = 0
        for file, each, entry in zip(files, forms, content_entries, strict=True):
            yield from formats.read(file, each, field, offset)
            offset += entry.size

    return Documents(
        Path(files[0]).name.split(".")[0],
        repr((key, field, forms)),
        sum(e.size for e in content_entries),
        pieces,
        content_entries,
        tuple(f for f, e in zip(files, content_entries, strict=True) if not e.size),
    )


def matching_files(globs: Sequence[str], option: str) -> list[str]:
    """The files that match `globs` or have such a name, each once; ValueError names `option`."""
    files: dict[str, str] = {}  # path without links -> as it was named
    for pattern in globs:
        check(
            not is_remote(pattern),
            f"{option}={pattern!r}: text is read from a local disk; copy it there first (gcloud storage cp)",
        )
        path = os.path.expanduser(pattern)
        # A file of just this name comes first: brackets need not be a pattern.
        matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        matches = [m for m in matches if os.path.isfile(m)]
        check(
            bool(matches),
            f"no file matches {option}={pattern!r} (looked from {os.getcwd()}); give text, JSONL"
            " or Parquet files or globs, in quotes",
        )
        for match in matches:
            files.setdefault(os.path.realpath(match), match)
    names = list(files.values())
    duplicate = next((name for name in names if f"{name}.gz" in names), None)
    check(
        duplicate is None,
        f"{option} matches {duplicate} and {duplicate}.gz, one the other compressed by its name: its text"
        " would be read twice. Leave one, or narrow the pattern",
    )
    return names


def tfds_documents(config: TFDS, splits: str, field: str) -> Documents:
    """Documents of a prepared TFDS set, one for each example; splits: `train[:90%]+test`."""
    parts = [tfds.locate(config, split) for split in splits.split("+")]
    key = [(tfds.fingerprint(p.directory, p.name), *p[1:]) for p in parts]
    files = [f for p in parts for f in p.directory.glob(f"*-{p.name}.*")]

    def pieces() -> Iterator[Piece]:
        num_bytes = 0
        for part in parts:
            reader = tfds.open_reader(config, part.directory, part.name, [field])
            for start in range(part.start, part.stop, 256):
                with tfds.quiet():
                    examples = reader.__getitems__(list(range(start, min(start + 256, part.stop))))
                for number, example in enumerate(examples, start):
                    value = example[field]
                    check(
                        isinstance(value, bytes | str),
                        f"feature {field!r} of {config.name!r} is no text (data.field)",
                    )
                    num_bytes += len(value)
                    try:
                        text = value if isinstance(value, str) else value.decode("utf-8")
                    except UnicodeDecodeError as error:
                        reason = f"{config.name}, {part.name} example {number}: not UTF-8 ({error.reason})"
                        yield Piece("", True, True, num_bytes, reason)
                    else:
                        yield Piece(text, True, True, num_bytes)

    name, _, _ = tfds.parse_name(config.name)
    embedded = name in EMBEDDED
    entries = [e for p in parts for e in tfds.slice_content(p, embedded=embedded)]
    size = sum(f.stat().st_size for f in files)
    return Documents(name, repr((key, field)), size, pieces, entries)


# ---- tokens in the cache


def character_tokenizer(documents: Sequence[Documents], cache_dir: str, skip_bad: int = 0) -> Chars:
    """The character tokenizer over all of `documents`; its vocabulary is kept in the cache."""
    cache = _cache_path(documents[0].name, [d.key for d in documents], "characters", cache_dir)
    file = "characters.json"

    def write(part: Path) -> dict[str, Any]:
        characters: set[str] = set()
        for documents_of_split in documents:
            bad, candidate = caches.BadRecords(skip_bad), set[str]()
            for piece in documents_of_split.pieces():
                if piece.bad:
                    bad.add(piece.bad)
                    candidate = set()
                candidate.update(piece.text)
                if piece.last:
                    characters |= candidate
                    candidate = set()
        empty = [name for documents_of_split in documents for name in documents_of_split.empty]
        check(bool(characters), f"the text {documents[0].name} is empty: {shorten_list(empty)}")
        (part / file).write_text(json_text("".join(sorted(characters))))
        return {"characters": len(characters)}

    if not caches.read_facts(cache):
        caches.build(cache, write)
    return Chars(json.loads((cache / file).read_text()))


def shorten_list(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tokenize(
    documents: Documents, tokenizer: Tokenizer, cache_dir: str, skip_bad: int = 0
) -> Tokens:
    """The concatenated tokens of all documents, mapped from the cache, which is built if it is missing.

    skip_bad: how many bad documents may pass, without tokens; ValueError names the first beyond them.
    """
    cache = _cache_path(documents.name, [documents.key], tokenizer.key, cache_dir)
    if not caches.read_facts(cache):
        caches.build(cache, lambda part: _write_tokens(part, documents, tokenizer, skip_bad))
    bad = caches.BadRecords(skip_bad)
    for reason in caches.read_facts(cache)[
        "bad"
    ]:  # the run that built it may have had another limit
        bad.add(reason)
    # A mapping of no bytes is refused.
    load = lambda name, mode: np.load(cache / name, mmap_mode=mode, allow_pickle=False)
    return Tokens(
        load("tokens.npy", "r" if caches.read_facts(cache)["tokens"] else None),
        load("starts.npy", None),
        tuple(bad.reasons),
    )


def _cache_path(name: str, keys: Sequence[str], tokenizer: str, cache_dir: str) -> Path:
    digest = hashlib.sha256(repr((FORMAT, list(keys), tokenizer)).encode("utf-8", "surrogatepass"))
    return Path(cache_root(cache_dir)) / "tokens" / f"{name}-{digest.hexdigest()[:16]}"


def _write_tokens(
    part: Path, documents: Documents, tokenizer: Tokenizer, skip_bad: int
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    show = caches.progress_printer(f"tokenizing {documents.name}", documents.size, large=_LARGE)
    begin, end = (
        np.array([] if i is None else [i], dtype) for i in (tokenizer.begin, tokenizer.end)
    )
    bad = caches.BadRecords(skip_bad)
    lengths = [0]  # of the documents; the last is not at its end
    with (part / "tokens.npy").open("wb") as out:
        head = _write_header(out, dtype, 0)
        for chunk in _group_pieces(documents.pieces()):
            encoded = tokenizer.encode([piece.text for piece in chunk])
            for piece, ids in zip(chunk, encoded, strict=True):
                if piece.bad:
                    bad.add(piece.bad)
                    out.seek(-lengths[-1] * dtype.itemsize, os.SEEK_CUR)  # what was read of it
                    out.truncate()
                    lengths[-1] = 0
                    continue
                ids_with_ends = np.concatenate(
                    [*[begin] * piece.first, ids.astype(dtype), *[end] * piece.last]
                )
                out.write(ids_with_ends.tobytes())
                lengths[-1] += len(ids_with_ends)
                if piece.last:
                    lengths.append(0)
            show(chunk[-1].done)
        out.seek(0)
        assert _write_header(out, dtype, sum(lengths)) == head  # the length has room in the header
    ends = np.cumsum([n for n in lengths if n], dtype=np.int64)
    np.save(part / "starts.npy", np.concatenate([[0], ends[:-1]]) if len(ends) else ends)
    return {
        "tokens": sum(lengths),
        "documents": len(ends),
        "vocabulary": tokenizer.vocab_size,
        "bad": bad.reasons,
    }


def _write_header(out: Any, dtype: np.dtype, num: int) -> int:
    shape = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num,)}
    np.lib.format.write_array_header_1_0(out, shape)
    return out.tell()


def _group_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about formats.CHUNK characters; documents without text are left out."""
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        if piece.first and piece.last and not piece.text and not piece.bad:
            continue
        chunk.append(piece)
        size += len(piece.text)
        if size >= formats.CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
