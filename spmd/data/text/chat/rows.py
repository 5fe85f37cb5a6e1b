"""Rows of conversations and of preferences: rendered, tokenized and packed once, kept in the cache."""

# N examples, T tokens of a row, P sequences

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmd.data import cache as caches
from spmd.data import cache_root
from spmd.data.text.chat.conversation import TokenizedChat
from spmd.data.text.packing import OPEN_ROWS, Ragged, pack
from spmd.data.text.records import Record, Records

FORMAT = 1  # raised when the same records would give other rows
Read = Callable[
    [Record], list[TokenizedChat]
]  # the sequences of a record; ValueError with the reason


class PackedSequences:
    """Rows of token sequences with their targets, by random access.

    Args:
        tokens: of all sequences.
        counts: whether each token counts, as a target.
        rows: the numbers of the sequences of each row.
        length: T.
        facts: of the cache: `longer`, the records that are longer than a row, and `cut`, those of them that
            are cut to it; the others are left out.
    """

    def __init__(
        self,
        tokens: Ragged,
        counts: np.ndarray,
        rows: Ragged,
        length: int,
        facts: dict[str, Any],
    ):
        self._tokens, self._counts, self._rows, self._length = tokens, counts, rows, length
        self.records, self.longer, self.cut = facts["records"], facts["longer"], facts["cut"]
        self.skipped = tuple(facts["bad"])

    def __len__(self) -> int:
        return len(self._rows.starts) - 1

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` int64 [N]: the features of a batch, int32 [N, T]."""
        shape = (len(indices), self._length)
        names = ("tokens", "positions", "segments")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["targets"] = np.full(shape, -1, np.int32)
        for row, index in enumerate(indices):
            at = 0
            for segment, number in enumerate(self._rows[int(index)], 1):
                start, stop = self._tokens.starts[number], self._tokens.starts[number + 1]
                ids, counts = self._tokens.tokens[start:stop], self._counts[start:stop]
                place = slice(at, at + len(ids) - 1)
                at = place.stop
                batch["tokens"][row, place] = ids[:-1]
                batch["targets"][row, place] = np.where(counts[1:], ids[1:].astype(np.int32), -1)
                batch["positions"][row, place] = np.arange(len(ids) - 1)
                batch["segments"][row, place] = segment
        return batch


def open_rows(
    records: Records,
    read: Read,
    key: Iterable[Any],
    length: int,
    *,
    packed: bool,
    cut: bool,
    cache_dir: str,
    skip_bad: int,
) -> PackedSequences:
    """The rows of records, mapped from the cache, which is built if it is missing.

    Args:
        records: of the split.
        read: the sequences of a record, which share a row.
        key: what `read` depends on.
        length: tokens of a row.
        packed: several records in a row, as many as fit.
        cut: a record that is longer than a row is cut to it; else it is left out.
        cache_dir: data.cache_dir.
        skip_bad: how many bad records may pass.

    Raises:
        ValueError: more records are bad: it names the first beyond the limit.
    """
    about = (FORMAT, records.key, tuple(key), length, packed, cut)
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    cache = Path(cache_root(cache_dir)) / "chats" / f"{records.name}-{digest}"
    write = lambda part: _write(part, records, read, length, packed, cut, skip_bad)
    facts = caches.open_records(cache, write, skip_bad)
    tokens, rows = (Ragged.load(cache, name) for name in ("tokens", "rows"))
    counts = np.load(cache / "counts.npy", allow_pickle=False)
    return PackedSequences(tokens, counts, rows, length, facts)


def _write(
    part: Path, records: Records, read: Read, length: int, packed: bool, cut: bool, skip_bad: int
) -> dict[str, Any]:
    """Tokenize and pack; the facts of the cache."""
    bad = caches.BadRecords(skip_bad)
    num = longer = shortened = 0
    sequences: list[TokenizedChat] = []
    of_record: list[range] = []
    sizes: list[int] = []
    for num, record in enumerate(records.read(), 1):
        try:
            if record.bad:
                raise ValueError(record.bad)
            found = read(record)
        except ValueError as error:
            bad.add(record.bad or f"record {num} of {records.name}: {error}")
            continue
        size = sum(len(each.ids_T) - 1 for each in found)
        if size > length:
            longer += 1
            found = (
                [TokenizedChat(*(x[: length + 1] for x in each)) for each in found] if cut else []
            )
            if not found or not found[0].counts_T[1:].any():  # nothing of it is learned
                continue
            size, shortened = length, shortened + 1
        of_record.append(range(len(sequences), len(sequences) + len(found)))
        sizes.append(size)
        sequences += found
    _report(records.name, num, longer, shortened, length)
    sizes_P2 = np.repeat(np.array(sizes, np.int64)[:, None], 2, axis=1)
    rows = pack(sizes_P2, (length, length), OPEN_ROWS if packed else 0)
    numbers = [[n for record in rows[i] for n in of_record[record]] for i in range(_num(rows))]
    save = lambda name, x: np.save(part / f"{name}.npy", x)
    save("tokens", np.concatenate([np.zeros(0, np.uint32), *(x.ids_T for x in sequences)]))
    save("counts", np.concatenate([np.zeros(0, bool), *(x.counts_T for x in sequences)]))
    save("tokens_starts", _starts([x.ids_T for x in sequences]))
    save("rows", np.array([n for row in numbers for n in row], np.int64))
    save("rows_starts", _starts(numbers))
    return {"records": num, "longer": longer, "cut": shortened, "bad": bad.reasons}


def _report(name: str, num: int, longer: int, cut: int, length: int) -> None:
    """Tells of the records that do not fit."""
    for count, fate in ((longer - cut, "left out"), (cut, "cut to it")):
        if count:
            print(
                f"{name}: {count} of {num} conversations are longer than data.sequence_length={length} and"
                f" {fate}",
                file=sys.stderr,
                flush=True,
            )


def _num(ragged: Ragged) -> int:
    return len(ragged.starts) - 1


def _starts(parts: Sequence[Any]) -> np.ndarray:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
