"""Digests of array_record files whose records are tf.train.Example, the same however they were written.

TFDS writes the features of a record in the order of a hash table, which differs from one process to the next:
two preparations of one set differ in their bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from spmd.data.content import EDGE, Entry

_AT_ONCE = 64  # records of one read


def entry(file: Path, name: str) -> Entry:
    """Fingerprint of a file: the number of its records, and those in its first and last MiB."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        num = reader.num_records()
        found = hashlib.sha256(str(num).encode())
        stopped = num
        for numbers in (range(num), range(num - 1, -1, -1)):
            size = 0
            for number, record in _read(reader, numbers):
                if size >= EDGE or (numbers.step < 0 and number < stopped):
                    break
                stopped = number + 1 if numbers.step > 0 else stopped
                size += len(record)
                found.update(hashlib.sha256(canonical(record)).digest())
    finally:
        reader.close()
    return Entry(name, 0, found.hexdigest()[:32])


def _read(reader: object, numbers: range) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(numbers), _AT_ONCE):
        some = list(numbers[at : at + _AT_ONCE])
        yield from zip(some, reader.read(some), strict=True)  # type: ignore[attr-defined]


def canonical(record: bytes) -> bytes:
    """A serialized tf.train.Example with its features sorted; another record as it is."""
    outer = _parts(record)
    features = _parts(outer[0]) if outer is not None and len(outer) == 1 else None
    if features is None:
        return record
    return b"".join(len(x).to_bytes(8, "little") + x for x in sorted(features))


def _parts(message: bytes) -> list[bytes] | None:
    """The values of a protocol buffer that has field 1 alone, length-delimited; None for another."""
    found, at = [], 0
    while at < len(message):
        if message[at] != 0x0A:
            return None
        at, size, shift = at + 1, 0, 0
        while True:
            if at >= len(message) or shift > 63:
                return None
            byte = message[at]
            at, size, shift = at + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        if at + size > len(message):
            return None
        found.append(message[at : at + size])
        at += size
    return found
