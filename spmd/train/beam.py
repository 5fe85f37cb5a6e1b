"""Beam search: the most likely sequences of a model that gives one token after the other."""

# B sources, W beams, T tokens, V vocab

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from spmd.core import tree
from spmd.core.fields import check

# (tokens [B W, 1], position [], cache) -> (logits [B W, V], cache)
Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """Width and length penalty of a beam search.

    A sequence of n tokens, its end token counted, scores log-probability / penalty(n): `gnmt` ((5 + n) / 6)^a
    (Wu et al. 2016, arXiv 1609.08144, equation 14; T5 too), `power` n^a (generate of transformers).
    """

    beams: int = 4
    """Sequences kept for each source."""
    alpha: float = 0.6
    """Exponent a of the penalty; 0 prefers short sequences, more prefers longer ones."""
    penalty: Literal["gnmt", "power"] = "gnmt"
    """Form of the penalty."""

    def __post_init__(self) -> None:
        check(self.beams >= 1, f"--beams {self.beams} must be at least 1")
        check(self.alpha >= 0, f"--length-penalty {self.alpha} must not be negative")

    def divisor(self, length: jax.Array, dtype: Any) -> jax.Array:
        """The penalty of sequences of so many tokens."""
        size = length.astype(dtype)
        return ((5 + size) / 6 if self.penalty == "gnmt" else size) ** self.alpha


class _State(NamedTuple):
    """time: tokens so far. The live sequences, their log-probabilities; the ended ones, their scores."""

    time: jax.Array
    live_BWT: jax.Array
    live_BW: jax.Array
    ended_BWT: jax.Array
    ended_BW: jax.Array
    cache: Any


def search(
    config: BeamSearch,
    step: Step,
    cache: Any,
    limit_B: jax.Array,
    *,
    begin: int,
    end: int,
    length: int,
    reorder: Callable[[Any, jax.Array], Any],
) -> tuple[jax.Array, jax.Array]:
    """(sequences int32 [B, W, T], their scores [B, W]), the best first.

    A sequence ends with `end`, or when it has as many tokens as its limit; `end` fills the rest. The search
    for a source stops when no live sequence can reach the score of the worst ended one, so that a source's
    result does not depend on the others in its batch.

    Args:
        config: width and penalty.
        step: the model.
        cache: its state, of B W rows.
        limit_B: most tokens of each sequence, at most `length`; 0 for a row that is padding.
        begin: token before the first.
        end: token that ends a sequence.
        length: T.
        reorder: (cache, [B, W] beams whose state each beam takes over) -> cache.

    Returns:
        Sequences and scores, -inf where there are fewer.
    """
    num, width = limit_B.shape[0], config.beams
    empty_BWT = jnp.full((num, width, length), end, jnp.int32)
    logits = jax.eval_shape(step, empty_BWT[:, :, 0].reshape(-1, 1), jnp.int32(0), cache)[0]
    nothing_BW = jnp.full((num, width), -jnp.inf, tree.at_least_float32(logits.dtype))
    first_BW = nothing_BW.at[:, 0].set(0)  # the beams are one at first
    rules = _Rules(config, step, limit_B, begin, end, reorder)
    start = _State(jnp.zeros((), jnp.int32), empty_BWT, first_BW, empty_BWT, nothing_BW, cache)
    final = jax.lax.while_loop(rules.goes_on, rules.advance, start)
    return final.ended_BWT, final.ended_BW


class _Rules(NamedTuple):
    """The arguments of a search, and its step."""

    config: BeamSearch
    step: Step
    limit_B: jax.Array
    begin: int
    end: int
    reorder: Callable[[Any, jax.Array], Any]

    def advance(self, state: _State) -> _State:
        """The state with a token more."""
        config, (num, width) = self.config, state.live_BW.shape
        before_BW = state.live_BWT[:, :, jnp.maximum(state.time - 1, 0)]
        before_BW = jnp.where(state.time == 0, self.begin, before_BW)
        logits, cache = self.step(before_BW.reshape(-1, 1), state.time, state.cache)
        logits_BWV = logits.reshape(num, width, -1).astype(state.live_BW.dtype)
        vocab = logits_BWV.shape[-1]
        total_BWV = state.live_BW[..., None] + jax.nn.log_softmax(logits_BWV)
        # Each beam has one continuation that ends: of 2 W candidates at least W go on.
        total_BC, place_BC = jax.lax.top_k(total_BWV.reshape(num, -1), 2 * width)
        beam_BC, token_BC = place_BC // vocab, (place_BC % vocab).astype(jnp.int32)
        taken_BCT = jnp.take_along_axis(state.live_BWT, beam_BC[..., None], axis=1)
        taken_BCT = taken_BCT.at[:, :, state.time].set(token_BC)

        size = state.time + 1
        ends_BC = (token_BC == self.end) | (size == self.limit_B)[:, None]
        nothing = jnp.array(-jnp.inf, total_BC.dtype)
        score_BC = jnp.where(ends_BC, total_BC / config.divisor(size, total_BC.dtype), nothing)
        # At its limit only W sequences of a source are candidates, as they would have gone on.
        going_BC = token_BC != self.end
        score_BC = jnp.where(going_BC & (jnp.cumsum(going_BC, axis=1) > width), nothing, score_BC)
        ended_BWT, ended_BW, _ = _best(
            width,
            jnp.concatenate([state.ended_BWT, taken_BCT], axis=1),
            jnp.concatenate([state.ended_BW, score_BC], axis=1),
        )
        live_BWT, live_BW, at_BW = _best(width, taken_BCT, jnp.where(ends_BC, nothing, total_BC))
        cache = self.reorder(cache, jnp.take_along_axis(beam_BC, at_BW, axis=1))
        return _State(size, live_BWT, live_BW, ended_BWT, ended_BW, cache)

    def goes_on(self, state: _State) -> jax.Array:
        """Whether a live sequence can still reach the score of the worst ended one."""
        # Log-probabilities only fall; the longest sequence divides by most.
        divisor_B = self.config.divisor(self.limit_B, state.live_BW.dtype)
        reachable_B = state.live_BW.max(1) / divisor_B
        return jnp.any((reachable_B > state.ended_BW.min(1)) & (state.time < self.limit_B))


def _best(
    width: int, sequences_BCT: jax.Array, score_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the `width` sequences of the highest scores, their scores, their places)."""
    best_BW, at_BW = jax.lax.top_k(score_BC, width)
    return jnp.take_along_axis(sequences_BCT, at_BW[..., None], axis=1), best_BW, at_BW
