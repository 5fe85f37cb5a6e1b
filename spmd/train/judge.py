"""Log-likelihoods and continuations of a language model on its mesh, as evaluation harnesses ask for them."""

# B rows of a batch, T time, V vocab

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.fields import check
from spmd.data.text.tokenizer import Tokenizer
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding
from spmd.train import sample
from spmd.train.snapshot import Snapshot

SHORTEST = 16  # tokens of a batch; longer ones are powers of two, so that few programs are compiled


class Scorer:
    """Log-likelihoods of token sequences; each process asks for the same sequences, and reads them all.

    Args:
        snapshot: a language model, called with tokens [B, T].
        length: most tokens that it takes.
        rows: sequences of a batch, rounded up to what the mesh divides.
    """

    def __init__(self, snapshot: Snapshot, length: int, rows: int):
        mesh, task = snapshot.program.mesh, snapshot.program.task
        ways = meshes.batch_shards(mesh)
        self.length, self.rows = length, -(-rows // ways) * ways
        self._variables = snapshot.variables
        self._sharding = NamedSharding(mesh, sharding.batch_spec())
        placement = sharding.placement(mesh, sharding.whole_sequences())

        def score(params: Any, state: Any, token_BT: jax.Array, target_BT: jax.Array) -> Any:
            with scope.bind(**placement):
                logits_BTV = task.call(params, state, lambda module: module(token_BT))
            counts_BT, index_BT = target_BT >= 0, jnp.maximum(target_BT, 0)
            log_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
            each_BT = jnp.take_along_axis(log_BTV, index_BT[..., None], axis=-1).squeeze(-1)
            greedy_BT = (logits_BTV.argmax(-1) == target_BT) | ~counts_BT
            return jnp.where(counts_BT, each_BT, 0).sum(-1), greedy_BT.all(-1)

        self._score = jax.jit(score, out_shardings=NamedSharding(mesh, P()))

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation after its context.

        Args:
            pairs: (context, continuation); the beginning of what is longer than the model is left out.
        """
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.rows):
            chosen = order[start : start + self.rows]
            token_BT, target_BT = self._batch([pairs[i] for i in chosen])
            put = lambda x: jax.device_put(x, self._sharding)
            total_B, greedy_B = self._score(*self._variables, put(token_BT), put(target_BT))
            for i, total, greedy in zip(
                chosen, np.asarray(total_B), np.asarray(greedy_B), strict=False
            ):
                scores[i] = (float(total), bool(greedy))
        return scores

    def _batch(self, pairs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets int32 [B, T]; targets are -1 in contexts and padding."""
        longest = min(max(len(a) + len(b) for a, b in pairs) - 1, self.length)
        time = min(max(SHORTEST, 1 << (longest - 1).bit_length()), self.length)
        token_BT = np.zeros((self.rows, time), np.int32)
        target_BT = np.full((self.rows, time), -1, np.int32)
        for row, (context, continuation) in enumerate(pairs):
            check(
                len(context) > 0, "a continuation is scored after a context of at least one token"
            )
            check(
                len(continuation) <= self.length,
                f"a continuation of {len(continuation)} tokens is longer than model.length={self.length}",
            )
            ids = np.array([*context, *continuation], np.int32)[-(self.length + 1) :]
            token_BT[row, : len(ids) - 1] = ids[:-1]
            first = len(ids) - 1 - len(continuation)
            target_BT[row, first : len(ids) - 1] = ids[len(ids) - len(continuation) :]
        return token_BT, target_BT


def complete(
    snapshot: Snapshot,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    choice: sample.Choice,
    until: Sequence[str],
    steps: sample.Steps | None = None,
) -> list[str]:
    """The text that continues each prompt, up to the first of `until`, which is left out.

    Args:
        snapshot: a language model.
        tokenizer: of the prompts.
        prompts: int [N] each.
        num_tokens: most tokens to generate.
        choice: how they are drawn.
        until: texts that end a continuation.
        steps: compiled ones of earlier calls with the same choice.
    """
    columns: list[np.ndarray] = []
    texts = [""] * len(prompts)
    generated = sample.generate(
        snapshot,
        prompts,
        num_tokens=num_tokens,
        choice=choice,
        end=tokenizer.end,
        vocab=tokenizer.vocab_size,
        steps=steps,
    )
    for column in generated:
        columns.append(column)
        if len(columns) % 8 == 0 or len(columns) == num_tokens:
            texts = [_text(tokenizer, columns, row) for row in range(len(prompts))]
            if until and all(any(stop in text for stop in until) for text in texts):
                break
    else:
        texts = [_text(tokenizer, columns, row) for row in range(len(prompts))]
    return [cut(text, until) for text in texts]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of `until` in it."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def _text(tokenizer: Tokenizer, columns: Sequence[np.ndarray], row: int) -> str:
    ids = [int(column[row]) for column in columns]
    if tokenizer.end in ids:
        ids = ids[: ids.index(tokenizer.end)]
    return tokenizer.decode(ids)
