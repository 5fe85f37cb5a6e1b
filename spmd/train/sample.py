"""Generate text with a language model: sharded cache, one token at a time, the same on every mesh."""

# B prompts, T time, V vocab

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.core.batches import Expected
from spmd.core.fields import check
from spmd.parallel import mesh as meshes
from spmd.parallel import scope, sharding
from spmd.train.snapshot import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 is all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together reach this probability (Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        check(self.temperature >= 0, f"--temperature {self.temperature} must not be negative")
        check(self.top_k >= 0, f"--top-k {self.top_k} must not be negative; 0 is all tokens")
        check(0 < self.top_p <= 1, f"--top-p {self.top_p} must be in (0, 1]")

    def filter(self, logits_BV: jax.Array) -> jax.Array:
        """Logits over the temperature, -inf where a token is excluded."""
        logits_BV = logits_BV / max(self.temperature, 1e-6)
        minus_infinity = jnp.array(-jnp.inf, logits_BV.dtype)
        if 0 < self.top_k < logits_BV.shape[1]:
            least_B1 = jax.lax.top_k(logits_BV, self.top_k)[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least_B1, minus_infinity, logits_BV)
        if self.top_p < 1:
            sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
            share_BV = jax.nn.softmax(sorted_BV, axis=-1)
            mass_before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV  # of the likelier ones
            is_kept_BV = mass_before_BV < self.top_p  # the likeliest always is
            least_B1 = jnp.min(
                jnp.where(is_kept_BV, sorted_BV, -minus_infinity), axis=-1, keepdims=True
            )
            logits_BV = jnp.where(logits_BV < least_B1, minus_infinity, logits_BV)
        return logits_BV

    def __call__(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        """Tokens int32 [B], each row drawn by its own key."""
        if not self.temperature:
            return logits_BV.argmax(-1).astype(jnp.int32)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, self.filter(logits_BV))
        return drawn_B.astype(jnp.int32)


def generate(
    snapshot: Snapshot,
    prompts: Sequence[np.ndarray],
    *,
    num_tokens: int,
    choice: Choice,
    seed: int = 0,
    end: int | None = None,
    vocab: int | None = None,
    steps: Steps | None = None,
) -> Iterator[np.ndarray]:
    """Continue prompts; yields int32 [len(prompts)], the next token of each.

    Ends after num_tokens, or when every row has had its `end` token, which fills the rest of a row. A draw
    depends on the seed, the row and the number of the token, never on the mesh.

    Args:
        snapshot: a language model.
        prompts: tokens int [N], N > 0, of each row.
        num_tokens: most tokens to generate.
        choice: how tokens are drawn.
        seed: of the draws.
        end: token that ends a text.
        vocab: number of tokens, if less than the rows of the model's table; others are never drawn.
        steps: compiled ones of earlier calls with the same arguments but prompts and num_tokens; lengths are
            rounded up, so that few are compiled.

    Raises:
        ValueError: the model cannot decode, or the lengths exceed its positions.
    """
    remaining = remaining_positions(snapshot, prompts)
    _check_prompts(snapshot, prompts)
    check(num_tokens >= 1, f"--tokens {num_tokens} must be at least 1")
    longest = max(map(len, prompts))
    check(
        num_tokens <= remaining,
        f"a prompt of {longest} tokens and --tokens {num_tokens} exceed the model's"
        f" {longest + remaining} positions; ask for at most {remaining}, or shorten the prompt",
    )
    size = (longest, longest + num_tokens)
    if steps is not None:
        limit = longest + remaining
        size = (min(_power(size[0]), limit), min(_power(size[1]), limit))
    steps = steps or Steps(snapshot, choice, seed, vocab)
    token_B, position_B, cache = steps.begin(prompts, *size)
    finished = np.zeros(len(prompts), bool)
    for i in range(num_tokens):
        current_B = token_B
        if i + 1 < num_tokens:  # computed while this token is read
            token_B, cache = steps.next(current_B, position_B, cache, i + 1)
            position_B = steps.later(position_B)
        tokens = np.asarray(current_B)[: len(prompts)].copy()
        if end is not None:
            tokens[finished] = end
            finished |= tokens == end
        yield tokens
        if finished.all():
            return


def _power(number: int) -> int:
    """The next power of two, at least 32."""
    return max(32, 1 << (number - 1).bit_length())


def remaining_positions(snapshot: Snapshot, prompts: Sequence[np.ndarray]) -> int:
    """Number of positions after the longest prompt; ValueError when there is none."""
    check(bool(prompts) and all(len(p) for p in prompts), "a prompt must have at least one token")
    longest, limit = max(map(len, prompts)), _max_length(snapshot.program.task, snapshot)
    check(
        longest < limit,
        f"a prompt of {longest} tokens leaves nothing of the model's {limit} positions; shorten it",
    )
    return limit - longest


def _check_prompts(snapshot: Snapshot, prompts: Sequence[np.ndarray]) -> None:
    """ValueError for a token that the model does not have."""
    token_ids = next((ids for ids in snapshot.program.ranges.values() if not ids.target), None)
    if token_ids is not None:
        expected = Expected("given", ranges={"prompt": token_ids})
        for i, prompt in enumerate(prompts):
            ids = np.array([i])
            expected.check_ranges({"prompt": np.asarray(prompt)[None], "example_id": ids})


def _max_length(task: Any, snapshot: Snapshot) -> int:
    """The longest sequence of the model; ValueError for a model that cannot decode."""

    def length(module: Any) -> jax.Array:
        check(
            all(hasattr(module, name) for name in ("decode", "cache")),
            f"{type(module).__name__} cannot continue a text: sampling needs a model with methods"
            " decode and cache, as spmd.models.transformer has them",
        )
        return jnp.zeros((module.config.length, 0))

    return jax.eval_shape(lambda p, s: task.call(p, s, length), *snapshot.variables).shape[0]


class Steps:
    """The jitted steps: the prompts at once, then one token of each row.

    Args:
        snapshot: a language model.
        choice: how tokens are drawn.
        seed: of the draws.
        vocab: as `generate` takes it.
    """

    def __init__(self, snapshot: Snapshot, choice: Choice, seed: int, vocab: int | None):
        mesh, task = snapshot.program.mesh, snapshot.program.task
        self._variables, self._ways = snapshot.variables, meshes.batch_shards(mesh)
        self._rows = NamedSharding(mesh, sharding.batch_spec())
        replicated = NamedSharding(mesh, P())
        placement = sharding.placement(mesh, sharding.whole_sequences())
        seed_key = jax.random.key(seed)

        def draw(logits_BV: jax.Array, number: jax.Array) -> jax.Array:
            row_B = jnp.arange(logits_BV.shape[0])
            keys_B = scope.example_keys(jax.random.fold_in(seed_key, number), row_B)
            return choice(logits_BV[:, :vocab], keys_B)

        def decode_prompts(params, model_state, tokens_BT, positions_BT, length: int):
            def run(module: Any) -> Any:
                cache = module.cache(tokens_BT.shape[0], length)
                return module.decode(tokens_BT, positions_BT, cache)

            with scope.bind(**placement):
                logits_BTV, cache = task.call(params, model_state, run)
            last_B11 = positions_BT.max(-1).reshape(-1, 1, 1)
            logits_BV = jnp.take_along_axis(logits_BTV, last_B11, axis=1).squeeze(1)
            return draw(logits_BV, jnp.zeros((), jnp.int32)), cache

        def decode_next(params, model_state, token_B, position_B, cache, number):
            run = lambda module: module.decode(token_B[:, None], position_B[:, None], cache)
            with scope.bind(**placement):
                logits_BTV, cache = task.call(params, model_state, run)
            return draw(logits_BTV.squeeze(1), number), cache

        # Every process can read all tokens.
        self._first = jax.jit(
            decode_prompts, static_argnames="length", out_shardings=(replicated, None)
        )
        self._next = jax.jit(decode_next, out_shardings=(replicated, None), donate_argnums=4)
        self.later = jax.jit(lambda position_B: position_B + 1)

    def begin(
        self, prompts: Sequence[np.ndarray], longest: int, length: int
    ) -> tuple[Any, Any, Any]:
        """(the first new token, its position, the cache), each [B], B rounded up to what the mesh divides.

        Args:
            prompts: tokens of each row.
            longest: tokens to which they are padded.
            length: tokens that the cache has room for.
        """
        num = -(-len(prompts) // self._ways) * self._ways
        rows = [prompts[min(i, len(prompts) - 1)] for i in range(num)]
        tokens_BT = np.zeros((num, longest), np.int32)
        positions_BT = np.full((num, longest), -1, np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
            positions_BT[i, : len(row)] = np.arange(len(row))
        put = functools.partial(jax.device_put, device=self._rows)
        token_B, cache = self._first(
            *self._variables, put(tokens_BT), put(positions_BT), length=length
        )
        return token_B, put(positions_BT.max(-1) + 1), cache

    def next(self, token_B: Any, position_B: Any, cache: Any, number: int) -> tuple[Any, Any]:
        """(token `number` of each row, the cache), after `token_B` at `position_B`."""
        return self._next(*self._variables, token_B, position_B, cache, np.int32(number))
