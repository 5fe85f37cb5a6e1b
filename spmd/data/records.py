"""Digests of array_record files of tf.train.Example, independent of the order of features in a record.

TFDS writes the features of a record in the order of a hash table, which differs between processes: two
preparations of a set differ in their bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from spmd.data.content import EDGE, Entry

_AT_ONCE = 64  # records of one read


def fingerprint(file: Path, name: str) -> Entry:
    """Fingerprint of a file: the number of its records, and those in its first and last MiB."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        num = reader.num_records()
        digest = hashlib.sha256(str(num).encode())
        end = num
        for numbers in (range(num), range(num - 1, -1, -1)):
            size = 0
            for number, record in _read(reader, numbers):
                if size >= EDGE or (numbers.step < 0 and number < end):
                    break
                end = number + 1 if numbers.step > 0 else end
                size += len(record)
                digest.update(hashlib.sha256(canonicalize(record)).digest())
    finally:
        reader.close()
    return Entry(name, 0, digest.hexdigest()[:32])


def _read(reader: object, numbers: range) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(numbers), _AT_ONCE):
        batch = list(numbers[start : start + _AT_ONCE])
        yield from zip(batch, reader.read(batch), strict=True)  # type: ignore[attr-defined]


def canonicalize(record: bytes) -> bytes:
    """A serialized tf.train.Example with its features sorted; any other record unchanged."""
    outer = _split_message(record)
    features = _split_message(outer[0]) if outer is not None and len(outer) == 1 else None
    if features is None:
        return record
    return b"".join(len(x).to_bytes(8, "little") + x for x in sorted(features))


def _split_message(message: bytes) -> list[bytes] | None:
    """The values of a protocol buffer that has field 1 alone, length-delimited; None for another."""
    values, position = [], 0
    while position < len(message):
        if message[position] != 0x0A:
            return None
        position, size, shift = position + 1, 0, 0
        while True:
            if position >= len(message) or shift > 63:
                return None
            byte = message[position]
            position, size, shift = position + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        if position + size > len(message):
            return None
        values.append(message[position : position + size])
        position += size
    return values
