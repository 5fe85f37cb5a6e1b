"""Text files: their formats and documents, read strictly."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from spmd.core.fields import check, closest

FORMATS = ("auto", "text", "jsonl")
LINES = (".jsonl", ".ndjson", ".json")
TABLE = ".parquet"
PLAIN = (".txt", ".text", ".md", ".rst", ".tex", ".py")
# Formats that are not read, and how to convert them.
OTHERS = {
    ".csv": "a table: convert it to .jsonl, a record on each line",
    ".tsv": "a table: convert it to .jsonl, a record on each line",
    ".parquet": "Parquet: give it the suffix .parquet, uncompressed",
    ".arrow": "Arrow: convert it to .jsonl, a record on each line",
    ".feather": "Arrow: convert it to .jsonl, a record on each line",
    ".avro": "Avro: convert it to .jsonl, a record on each line",
    ".zip": "an archive: unpack it",
    ".tar": "an archive: unpack it",
    ".tgz": "an archive: unpack it",
    ".7z": "an archive: unpack it",
    ".bz2": "compressed by bzip2: unpack it, or compress it with gzip",
    ".xz": "compressed by xz: unpack it, or compress it with gzip",
    ".zst": "compressed by zstd: unpack it, or compress it with gzip",
    ".lz4": "compressed by lz4: unpack it, or compress it with gzip",
    ".pdf": "PDF: extract its text",
    ".html": "HTML: extract its text, or take it as it is with --data.format text",
    ".xml": "XML: extract its text, or take it as it is with --data.format text",
}
TEXTUAL = (".csv", ".tsv", ".html", ".xml")  # of OTHERS, those that data.format=text allows
GZIP = b"\x1f\x8b"
# First bytes of files that are no text, whatever their names.
MAGIC = {
    b"PK\x03\x04": ".zip",
    **{b"BZh%d1AY&" % level: ".bz2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1\x15": ".parquet",
    b"ARROW1\x00\x00": ".arrow",
    b"Obj\x01": ".avro",
    b"%PDF-": ".pdf",
}
PIECE = 2**18  # characters: longer text files are encoded in pieces, on all cores
CHUNK = 2**22  # characters encoded at once


class Piece(NamedTuple):
    """Text of a document, or a part of a long one. done: bytes of the input read so far.

    bad: why the document cannot be read; it ends there, and earlier pieces of it are dropped.
    """

    text: str
    first: bool
    last: bool
    done: int
    bad: str = ""


class Format(NamedTuple):
    """How a file is read."""

    lines: bool  # a document on each line, as JSON; else the file is one document
    gzip: bool


def list_supported() -> str:
    """Supported suffixes, for messages."""
    return (
        f"text ({', '.join(PLAIN)}) and JSON lines ({', '.join(LINES)}), each also with .gz, and {TABLE}; for"
        " another suffix say which it is with --data.format text or --data.format jsonl"
    )


def recognise(file: str, form: str = "auto") -> Format:
    """The format of a file by its suffix, or as `form` (data.format) says; does not open the file.

    ValueError for an unknown suffix: no format is assumed silently.
    """
    suffixes = [s.lower() for s in Path(file).suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if gzipped else suffixes)[-1:]
    suffix = suffix[0] if suffix else ""
    if suffix == TABLE and not gzipped:
        check(form == "auto", f"{file} is Parquet by its name: leave out --data.format {form}")
        return Format(lines=True, gzip=False)
    if suffix in OTHERS and not (form != "auto" and suffix in TEXTUAL):
        raise ValueError(f"{file} is not read: {OTHERS[suffix]}. What works: {list_supported()}")
    recognised = suffix in LINES + PLAIN
    check(
        recognised or form != "auto",
        f"{file} has {f'the suffix {suffix}' if suffix else 'no suffix'}, which says nothing of its format."
        f"{closest(suffix, LINES + PLAIN) if suffix else ''} What works: {list_supported()}",
    )
    return Format(form == "jsonl" or (form == "auto" and suffix in LINES), gzipped)


def _check_head(file: str, gzipped: bool, head: bytes) -> None:
    """ValueError when the first bytes of a file contradict its name."""
    if gzipped and head:
        check(
            head.startswith(GZIP),
            f"{file} ends in .gz, but is not compressed by gzip (it begins with {head[:4]!r}); compress it,"
            " or take the .gz from its name",
        )
    elif head.startswith(GZIP):
        raise ValueError(
            f"{file} is compressed by gzip, and its name does not say so; rename it to"
            f" {Path(file).name}.gz, or unpack it"
        )
    for magic, suffix in () if gzipped else MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{file} is no text by its first bytes, but {OTHERS[suffix]}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not gzipped:
        raise ValueError(f"{file} is UTF-16 text: convert it (iconv -f UTF-16 -t UTF-8)")


def read(file: str, form: Format, field: str, offset: int) -> Iterator[Piece]:
    """The documents of a file; offset: bytes of the input before it.

    A document that is not UTF-8 or JSON, or a row without text, is bad. ValueError for a file that cannot be
    read to its end, since its number of documents is unknown.
    """
    if is_table(file):
        yield from _read_table(file, field, offset)
        return
    position = _Position()
    try:
        with open(file, "rb") as raw:
            _check_head(file, form.gzip, raw.read(8))
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if form.gzip else raw
            done = lambda: offset + raw.tell()
            if form.lines:
                yield from _read_records(file, stream, field, done, position)
            else:
                yield from _read_document(file, stream, done)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{file} is damaged behind line {position.line} ({error}): nobody knows how many records"
            " follow, so data.skip_bad does not let it pass; copy or compress it anew, or leave it out"
        ) from None
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror or error}") from None


def is_table(file: str) -> bool:
    """Whether a file is Parquet by its name."""
    return file.lower().endswith(TABLE)


def _read_table(file: str, field: str, offset: int) -> Iterator[Piece]:
    """The texts of a column of Parquet, a document for each row."""
    import pyarrow as pa

    from spmd.data.tables.parquet import open_file

    table, row = open_file(file), 0
    types = {column.name: column.type for column in table.schema_arrow}
    check(
        field in types,
        f"{file}: no column {field!r} (data.field).{closest(field, types)} It has: {', '.join(types)}",
    )
    of_values = lambda t: t.value_type if pa.types.is_dictionary(t) else t
    texts = {n for n, t in types.items() if str(of_values(t)).removeprefix("large_") == "string"}
    check(
        field in texts,
        f"{file}: the column {field!r} (data.field) is {types[field]}, not text."
        + (f" Columns with text: {', '.join(sorted(texts))}" if texts else ""),
    )
    size, num_rows = Path(file).stat().st_size, max(table.metadata.num_rows, 1)
    try:
        for batch in table.iter_batches(2**12, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                done = offset + size * row // num_rows
                missing = f"{file}, row {row}: the column {field!r} (data.field) is empty"
                yield Piece(text or "", True, True, done, missing if text is None else "")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is damaged behind row {row} ({' '.join(str(error).split())[:150]}): copy it anew, or"
            " leave it out"
        ) from None


class _Position:
    line = 0


def _read_records(
    file: str, stream: BinaryIO, field: str, done: Callable[[], int], position: _Position
) -> Iterator[Piece]:
    for raw in stream:
        for line in raw.splitlines() if b"\r" in raw else (raw,):  # of an old Mac
            position.line += 1
            line = line.removeprefix(codecs.BOM_UTF8)  # files put one after the other have several
            if not line.strip():
                continue
            try:
                text = _extract_text(line, field)
            except (ValueError, RecursionError) as error:
                reason = (
                    "its JSON is nested too deeply" if isinstance(error, RecursionError) else error
                )
                yield Piece("", True, True, done(), f"{file}, line {position.line}: {reason}")
            else:
                yield Piece(text, True, True, done())


def _extract_text(line: bytes, field: str) -> str:
    """The text of a JSON record; ValueError says why there is none."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({_describe_byte(error)})") from None
    except json.JSONDecodeError as error:
        hint = ""
        if line.strip() in (b"[", b"{") or line.lstrip()[:1] == b"[":
            hint = (
                "; JSON lines have a whole record on each line (jq -c '.[]' makes them of an array)"
            )
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}{hint}") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"not a JSON object but {_describe_json(record)}: it has no field {field!r} (data.field)"
        )
    if field not in record:
        raise ValueError(
            f"no field {field!r} (data.field).{closest(field, record)}"
            f" It has: {', '.join(record) or 'no fields'}"
        )
    text = record[field]
    if not isinstance(text, str):
        others = [k for k, v in record.items() if isinstance(v, str)]
        raise ValueError(
            f"the field {field!r} (data.field) is {_describe_json(text)}, not text."
            + (f" Fields with text: {', '.join(others)}" if others else "")
        )
    if not text.isascii():
        check_text(text)
    return text


def check_text(text: str) -> None:
    """ValueError for half of a surrogate pair, which JSON can express and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"half of a surrogate pair (\\u{code:04x}) at character {error.start}: no character, and no UTF-8"
        ) from None


def _describe_json(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    number = f" ({value})" if isinstance(value, int | float) else ""
    return kinds.get(type(value), "an object") + number


def _describe_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}"


def _read_document(file: str, stream: BinaryIO, done: Callable[[], int]) -> Iterator[Piece]:
    """A file as one document, in pieces that end before lines without indent: no token crosses these.

    Any damage makes the document bad.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    first, text, lines = True, "", 0
    more = True
    while more:
        try:
            block = stream.read(PIECE)
            more = bool(block)
            text += decoder.decode(block, final=not more)
        except UnicodeDecodeError as error:
            line = lines + text.count("\n") + error.object[: error.start].count(b"\n") + 1
            yield Piece(
                "", first, True, done(), f"{file}, line {line}: not UTF-8 ({_describe_byte(error)})"
            )
            return
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            line = lines + text.count("\n") + 1
            yield Piece("", first, True, done(), f"{file} is damaged near line {line}: {error}")
            return
        cut = len(text)
        while (cut := text.rfind("\n", 0, cut)) > 0:
            if cut + 1 < len(text) and not text[cut + 1].isspace():
                break
        if cut <= 0 and len(text) >= CHUNK:
            cut = len(text) - 2  # one line of millions of characters is cut anywhere
        if more and cut > 0 and len(text) >= PIECE:
            yield Piece(text[: cut + 1], first, False, done())
            lines += text.count("\n", 0, cut + 1)
            first, text = False, text[cut + 1 :]
    yield Piece(text, first, True, done())
