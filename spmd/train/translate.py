"""Translate with an encoder-decoder: batches by length, sharded caches, the same result on every mesh."""

# B sources, S tokens of a source, W beams, T tokens of a target, V vocab

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.fields import check
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding
from spmd.train.beam import BeamSearch, search
from spmd.train.sample import Choice
from spmd.train.snapshot import Snapshot

SHORTEST = 16  # tokens of the shortest batch; others are powers of two


class Hypothesis(NamedTuple):
    """tokens: int32 [N], without the end token. score: log-probability / length penalty; 0 if drawn."""

    tokens: np.ndarray
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How targets are decoded."""

    search: BeamSearch | None = dataclasses.field(default_factory=BeamSearch)
    """Beam search; None draws one token after the other."""
    choice: Choice = dataclasses.field(default_factory=lambda: Choice(temperature=0.0))
    """How tokens are drawn without a search."""
    seed: int = 0
    """Seed of the draws, which depend on it, the number of the source and that of the token."""
    extra: int = 50
    """Most tokens of a target beyond those of its source (Vaswani et al. 2017, section 6.1)."""
    batch_size: int = 32
    """Sources decoded at once."""

    def __post_init__(self) -> None:
        check(self.extra >= 0, f"extra={self.extra} tokens must not be negative")
        check(self.batch_size >= 1, f"a batch of {self.batch_size} sources must be at least 1")


def translate(
    snapshot: Snapshot,
    sources: Sequence[np.ndarray],
    *,
    decoding: Decoding,
    end: int,
    vocab: int | None = None,
) -> list[list[Hypothesis]]:
    """The targets of sources, in their order: of each the best first, as many as the search has beams.

    Sources are sorted by length and decoded in batches of similar length. A result depends neither on the
    other sources nor on the mesh, but for rounding.

    Args:
        snapshot: of an encoder-decoder.
        sources: tokens int [S] of each, its end token included.
        decoding: search or draws.
        end: token that ends a target, and stands before its first.
        vocab: number of tokens, if less than the rows of the model's table; others are never chosen.

    Raises:
        ValueError: the model is no encoder-decoder, or a source is empty.
    """
    check(all(len(source) for source in sources), "a source must have at least one token")
    program = snapshot.program
    _check_model(program.task, snapshot)
    decode = _decoder(program.task.call, program.mesh, decoding, end, vocab)
    rows = NamedSharding(program.mesh, sharding.batch_spec())
    put = lambda x: jax.device_put(x, rows)
    results: list[list[Hypothesis]] = [[] for _ in sources]
    for batch in _batches(sources, decoding, meshes.batch_shards(program.mesh)):
        arrays = (put(x) for x in (batch.source_BS, batch.limit_B, batch.number_B))
        tokens_BWT, scores_BW = map(np.asarray, decode(*snapshot.variables, *arrays))
        for row, number in enumerate(batch.number_B[: batch.num]):
            limit = int(batch.limit_B[row])
            results[number] = [
                Hypothesis(_until(tokens[:limit], end), float(score))
                for tokens, score in zip(tokens_BWT[row], scores_BW[row], strict=True)
                if np.isfinite(score)
            ]
    return results


class _Batch(NamedTuple):
    """Sources of similar length. num: rows that are no padding; number_B: places of the sources."""

    source_BS: np.ndarray
    limit_B: np.ndarray
    number_B: np.ndarray
    num: int


def _batches(sources: Sequence[np.ndarray], decoding: Decoding, ways: int) -> Iterator[_Batch]:
    """Batches of at most batch_size sources, whose length is the same power of two when rounded up."""
    sizes = np.array([len(source) for source in sources], np.int64)
    length_N = SHORTEST << np.maximum(0, np.ceil(np.log2(np.maximum(sizes, 1) / SHORTEST))).astype(
        int
    )
    for length in np.unique(length_N):
        numbers = np.flatnonzero(length_N == length)
        for start in range(0, len(numbers), decoding.batch_size):
            chosen = numbers[start : start + decoding.batch_size]
            # Few shapes are compiled: rows are a whole batch, or a power of two where there is no more.
            rows = min(decoding.batch_size, 1 << (len(numbers) - 1).bit_length())
            rows = -(-rows // ways) * ways
            source_BS = np.full((rows, int(length)), -1, np.int32)
            limit_B, number_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
            for row, number in enumerate(chosen):
                source_BS[row, : sizes[number]] = sources[number]
                limit_B[row], number_B[row] = sizes[number] + decoding.extra, number
            yield _Batch(source_BS, limit_B, number_B, len(chosen))


@functools.lru_cache(maxsize=8)
def _decoder(
    call: Callable[..., Any], mesh: Mesh, decoding: Decoding, end: int, vocab: int | None
) -> Callable[..., Any]:
    """The compiled decoding of a batch, one for all calls with a task.

    It takes (params, model_state, source [B, S] with -1 for padding, limit [B], number [B]) and gives
    (tokens [B, W, T], scores [B, W]).
    """
    placement = sharding.placement(mesh, sharding.whole_sequences())
    replicated = NamedSharding(mesh, P())  # so that each process can read all rows
    beams = decoding.search.beams if decoding.search else 1

    @functools.partial(jax.jit, out_shardings=replicated)
    def decode(params, model_state, source_BS, limit_B, number_B):
        def step(token_B1: jax.Array, index: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            position_B1 = jnp.broadcast_to(index, token_B1.shape)
            run = lambda module: module.decode(token_B1, position_B1, cache)
            logits_BTV, cache = call(params, model_state, run)
            return logits_BTV[:, 0, :vocab], cache

        length = source_BS.shape[1] + decoding.extra
        segments_BS = (source_BS >= 0).astype(jnp.int32)
        encode = lambda module: module.encode(jnp.maximum(source_BS, 0), segments_BS, length, beams)
        with scope.bind(**placement):
            cache = call(params, model_state, encode)
            options = {"begin": end, "end": end, "length": length}
            if decoding.search:
                options |= {"reorder": _reorder}
                return search(decoding.search, step, cache, limit_B, **options)
            return _draw(decoding, step, cache, limit_B, number_B, **options)

    return decode


def _reorder(cache: Any, parent_BW: jax.Array) -> Any:
    """The cache in which each beam has the tokens of its parent, a beam of the same source."""
    num, width = parent_BW.shape

    def take(x: jax.Array) -> jax.Array:
        by_beam = x.reshape(x.shape[0], num, width, *x.shape[2:])
        index = parent_BW.reshape(1, num, width, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(by_beam, index, axis=2).reshape(x.shape)

    return cache._replace(own=jax.tree.map(take, cache.own))


def _draw(
    decoding: Decoding,
    step: Callable[..., Any],
    cache: Any,
    limit_B: jax.Array,
    number_B: jax.Array,
    *,
    begin: int,
    end: int,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, 1, T], zeros [B, 1]), one token after the other, greedily or drawn."""
    seed_key = jax.random.key(decoding.seed)

    def advance(state: Any) -> Any:
        index, tokens_BT, going_B, cache = state
        before_B = jnp.where(index == 0, begin, tokens_BT[:, jnp.maximum(index - 1, 0)])
        logits_BV, cache = step(before_B[:, None], index, cache)
        keys_B = scope.example_keys(jax.random.fold_in(seed_key, index), number_B)
        token_B = jnp.where(going_B, decoding.choice(logits_BV, keys_B), end)
        going_B &= (token_B != end) & (index + 1 < limit_B)
        return index + 1, tokens_BT.at[:, index].set(token_B), going_B, cache

    tokens_BT = jnp.full((len(limit_B), length), end, jnp.int32)
    start = (jnp.zeros((), jnp.int32), tokens_BT, limit_B > 0, cache)
    tokens_BT = jax.lax.while_loop(lambda state: state[2].any(), advance, start)[1]
    return tokens_BT[:, None], jnp.zeros((len(limit_B), 1))


def _until(tokens: np.ndarray, end: int) -> np.ndarray:
    """The tokens before the first end token."""
    ends = np.flatnonzero(tokens == end)
    return tokens[: ends[0]] if len(ends) else tokens


def _check_model(task: Any, snapshot: Snapshot) -> None:
    """ValueError for a model that is no encoder-decoder."""

    def look(module: Any) -> jax.Array:
        check(
            all(hasattr(module, name) for name in ("encode", "decode")),
            f"{type(module).__name__} cannot translate: it needs a model with methods encode and decode, as"
            " spmd.models.encoder_decoder has them",
        )
        return jnp.zeros(())

    jax.eval_shape(lambda p, s: task.call(p, s, look), *snapshot.variables)
