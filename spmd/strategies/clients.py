"""A labelled data set dealt to clients, and who trains on what in each round: pure functions of the seed."""

# N examples, C clients, S clients of a round, L rows that each of them gets in a round

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from spmd.core.fields import check

_CHUNK = 8192
_DEAL, _ROUND, _SHUFFLE = range(3)  # what is drawn, so that no two draws share a stream


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def label_of(batch: dict[str, Any]) -> str:
    """Name of the one integer feature of shape [B]; ValueError when there is none, or more."""
    names = [
        name
        for name, x in batch.items()
        if len(x.shape) == 1 and np.issubdtype(x.dtype, np.integer) and name != "example_id"
    ]
    check(
        len(names) == 1,
        "strategy federated deals the examples out by their label, and needs one integer feature of shape []:"
        f" the data has {', '.join(names) or 'none'}",
    )
    return names[0]


def labels(source: Any) -> np.ndarray:
    """[N] the labels of a source."""
    name = label_of(source.take(np.zeros(1, np.int64)))
    starts = range(0, len(source), _CHUNK)
    parts = [np.arange(at, min(at + _CHUNK, len(source))) for at in starts]
    return np.concatenate([source.take(part)[name] for part in parts])


def deal(label_N: np.ndarray, num_clients: int, alpha: float, seed: int) -> list[np.ndarray]:
    """The examples of each client, at least one: of each class, shares drawn from Dirichlet(alpha) (Hsu et
    al. 2019, arXiv 1909.06335).

    Args:
        label_N: class of each example.
        num_clients: number of clients.
        alpha: a small one gives a client few classes, and clients unequal sizes.
        seed: of the shares.
    """
    rng = _rng(seed, _DEAL)
    owner_N = np.empty(len(label_N), np.int64)
    for label in np.unique(label_N):
        members = rng.permutation(np.flatnonzero(label_N == label))
        share_C = rng.dirichlet(np.full(num_clients, alpha))
        ends = np.round(np.cumsum(share_C) * len(members)).astype(np.int64)
        owner_N[members] = np.searchsorted(ends, np.arange(len(members)), side="right").clip(
            max=num_clients - 1
        )
    sizes = np.bincount(owner_N, minlength=num_clients)
    for client in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        owner_N[np.flatnonzero(owner_N == largest)[0]] = client
        sizes[largest] -= 1
        sizes[client] += 1
    return [np.flatnonzero(owner_N == client) for client in range(num_clients)]


class ClientOrder:
    """Stream position -> example index, -1 for an empty row: the order of a federated run.

    In round t each of the S slots stands for one client, which passes over its own examples `epochs` times,
    in at most `period` steps; a client that drops out has empty rows only. Row slot * b + j of step h of a
    round is the client's example number h * b + j.
    """

    def __init__(
        self,
        owned: list[np.ndarray],
        num_slots: int,
        *,
        seed: int,
        batch_size: int,
        period: int,
        epochs: int,
        drop_outs: float,
    ):
        self._owned, self._num_slots, self._seed = owned, num_slots, seed
        self._batch_size, self._period, self._epochs = batch_size, period, epochs
        self._drop_outs = drop_outs
        self._table = functools.lru_cache(maxsize=3)(self._round)  # safe for threads

    def clients(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(the clients of a round [S], which of them drop out [S])."""
        rng = _rng(self._seed, _ROUND, number)
        chosen_S = rng.choice(len(self._owned), self._num_slots, replace=False)
        return chosen_S, rng.random(self._num_slots) < self._drop_outs

    def _round(self, number: int) -> np.ndarray:
        """[S, L] example indices."""
        rows = self._period * self._batch_size // self._num_slots
        table_SL = np.full((self._num_slots, rows), -1, np.int64)
        for slot, (client, dropped_out) in enumerate(zip(*self.clients(number), strict=True)):
            if dropped_out:
                continue
            rng, owned = _rng(self._seed, _SHUFFLE, number, client), self._owned[client]
            passes = min(self._epochs, -(-rows // len(owned)))
            examples = np.concatenate([rng.permutation(owned) for _ in range(passes)])[:rows]
            table_SL[slot, : len(examples)] = examples
        return table_SL

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        steps, rows = np.divmod(positions, self._batch_size)
        numbers, steps_within = np.divmod(steps, self._period)
        rows_per_slot = self._batch_size // self._num_slots
        slots, offsets = np.divmod(rows, rows_per_slot)
        out = np.empty_like(positions)
        for number in np.unique(numbers):
            in_round = numbers == number
            out[in_round] = self._table(int(number))[
                slots[in_round], steps_within[in_round] * rows_per_slot + offsets[in_round]
            ]
        return out
