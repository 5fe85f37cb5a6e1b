"""Pairs of token sequences, several in a row: tokenized and packed once, kept in the cache."""

# N examples, S tokens of a source side, T tokens of a target side, P pairs, R rows

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmd.data import cache as caches
from spmd.data import cache_root
from spmd.data.text.pairs import reason_of
from spmd.data.text.records import Record, Records
from spmd.data.text.tokenizer import Tokenizer

FORMAT = 1  # raised when the same records would give other rows
OPEN_ROWS = 16  # rows into which a pair may go; more are filled better, and packed slower
GROUP = 4096  # records encoded at once
SIDES = ("source", "target")


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences one after the other. tokens [M]; starts int64 [P + 1]."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def load(cls, folder: Path, name: str) -> Ragged:
        """Those of NAME.npy and NAME_starts.npy."""
        load = lambda stem: np.load(folder / f"{stem}.npy", allow_pickle=False)
        return cls(load(name), load(f"{name}_starts"))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


class PackedPairs:
    """Rows of pairs, by random access.

    Args:
        sides: the source tokens of all pairs, and their target tokens, without end tokens.
        rows: the numbers of the pairs of each row.
        lengths: (S, T).
        end: token that ends a source and a target, and begins the decoder's input.
        skipped: why records could not be read.
        longer: how many pairs are left out, since they are longer than a row.
    """

    def __init__(
        self,
        sides: tuple[Ragged, Ragged],
        rows: Ragged,
        lengths: tuple[int, int],
        end: int,
        skipped: Sequence[str] = (),
        longer: int = 0,
    ):
        self._sides, self._rows, self._lengths, self._end = sides, rows, lengths, end
        self.skipped, self.longer = tuple(skipped), longer

    def __len__(self) -> int:
        return len(self._rows.starts) - 1

    @property
    def num_pairs(self) -> int:
        """Pairs in all rows."""
        return len(self._rows.tokens)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `indices` int64 [N]: the features of a batch, int32 [N, S] and [N, T]."""
        num, (source_length, target_length) = len(indices), self._lengths
        sources = ("source", "source_positions", "source_segments")
        targets = ("tokens", "positions", "segments")
        batch = {name: np.zeros((num, source_length), np.int32) for name in sources}
        batch |= {name: np.zeros((num, target_length), np.int32) for name in targets}
        batch["targets"] = np.full((num, target_length), -1, np.int32)
        for row, index in enumerate(indices):
            at = [0, 0]
            for segment, pair in enumerate(self._rows[int(index)], 1):
                source, target = (side[int(pair)] for side in self._sides)
                for side, (names, size) in enumerate(
                    ((sources, len(source) + 1), (targets, len(target) + 1))
                ):
                    cut = slice(at[side], at[side] + size)
                    batch[names[1]][row, cut] = np.arange(size)
                    batch[names[2]][row, cut] = segment
                    at[side] += size
                from_, to = at[0] - len(source) - 1, at[1] - len(target) - 1
                batch["source"][row, from_ : at[0]] = [*source, self._end]
                batch["tokens"][row, to : at[1]] = [self._end, *target]
                batch["targets"][row, to : at[1]] = [*target, self._end]
        return batch


def open_pairs(
    records: Records,
    columns: tuple[str, ...],
    tokenizer: Tokenizer,
    lengths: tuple[int, int],
    *,
    packed: bool,
    cache_dir: str,
    skip_bad: int,
) -> PackedPairs:
    """The rows of records, mapped from the cache, which is built if it is missing.

    Args:
        records: pairs of texts.
        columns: their names, for messages.
        tokenizer: of both sides.
        lengths: tokens of a row's source side and target side.
        packed: several pairs in a row.
        cache_dir: data.cache_dir.
        skip_bad: how many bad records may pass.

    Raises:
        ValueError: more records are bad: it names the first beyond the limit.
    """
    about = (FORMAT, records.key, tokenizer.key, lengths, packed)
    digest = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    cache = Path(cache_root(cache_dir)) / "pairs" / f"{records.name}-{digest}"
    write = lambda part: _write(part, records, columns, tokenizer, lengths, packed, skip_bad)
    facts = caches.open_records(cache, write, skip_bad)
    source, target, rows = (Ragged.load(cache, name) for name in (*SIDES, "rows"))
    assert tokenizer.end is not None
    return PackedPairs(
        (source, target), rows, lengths, tokenizer.end, facts["bad"], facts["longer"]
    )


def pack(sizes_P2: np.ndarray, lengths: tuple[int, int], open_rows: int = OPEN_ROWS) -> Ragged:
    """The pairs of each row: first fit among the last rows that are not full, in a shuffled, fixed order.

    Args:
        sizes_P2: tokens of source and target of each pair, at most `lengths`.
        lengths: tokens that a row has room for.
        open_rows: 0 gives each pair a row of its own.

    Returns:
        The numbers of the pairs of each row.
    """
    order = np.random.Generator(np.random.Philox(0)).permutation(len(sizes_P2)).tolist()
    rows: list[list[int]] = []
    room: list[tuple[int, int, list[int]]] = []  # of the open rows
    sizes = sizes_P2.tolist()
    for pair in order:
        source, target = sizes[pair]
        for place, (left, right, row) in enumerate(room):
            if source <= left and target <= right:
                row.append(pair)
                room[place] = (left - source, right - target, row)
                break
        else:
            rows.append([pair])
            if open_rows:
                room.append((lengths[0] - source, lengths[1] - target, rows[-1]))
                if len(room) > open_rows:
                    room.remove(min(room, key=lambda each: min(each[:2])))
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Ragged(np.array(list(itertools.chain(*rows)), np.int64), starts)


def _write(
    part: Path,
    records: Records,
    columns: tuple[str, ...],
    tokenizer: Tokenizer,
    lengths: tuple[int, int],
    packed: bool,
    skip_bad: int,
) -> dict[str, Any]:
    """Tokenize and pack; the facts of the cache."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bad, longer, num = caches.BadRecords(skip_bad), 0, 0
    tokens: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for group in _groups(records.read()):
        good: list[tuple[str, str]] = []
        for record in group:
            num += 1
            reason = record.bad or reason_of(record.values, columns)
            if reason:
                bad.add(record.bad or f"record {num} of {records.name}: {reason}")
            else:
                good.append((record.values[0], record.values[1]))
        encoded = [tokenizer.encode([pair[side] for pair in good]) for side in (0, 1)]
        for pair in zip(*encoded, strict=True):
            if any(len(ids) + 1 > n for ids, n in zip(pair, lengths, strict=True)):
                longer += 1
                continue
            for side, ids in zip(tokens, pair, strict=True):
                side.append(ids.astype(dtype))
    if longer:
        print(
            f"{records.name}: {longer} of {num} pairs are left out, being longer than"
            f" data.source_length={lengths[0]} or data.target_length={lengths[1]}",
            file=sys.stderr,
            flush=True,
        )
    sizes_P2 = np.array([[len(a) + 1, len(b) + 1] for a, b in zip(*tokens, strict=True)], np.int64)
    rows = pack(sizes_P2.reshape(-1, 2), lengths, OPEN_ROWS if packed else 0)
    save = lambda name, x: np.save(part / f"{name}.npy", x)
    for name, side in zip(SIDES, tokens, strict=True):
        save(name, np.concatenate([np.zeros(0, dtype), *side]))
        save(f"{name}_starts", np.cumsum([0, *map(len, side)], dtype=np.int64))
    save("rows", rows.tokens)
    save("rows_starts", rows.starts)
    return {"pairs": len(tokens[0]), "longer": longer, "bad": bad.reasons}


def _groups(records: Iterator[Record]) -> Iterator[list[Record]]:
    while group := list(itertools.islice(records, GROUP)):
        yield group
