"""Masks: which keys a query sees, by their order and their segments."""

# B batch, T time of queries, S time of keys

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from spmd.core.fields import check

Kind = Literal["causal", "full", "window", "prefix"]
KINDS: tuple[Kind, ...] = ("causal", "full", "window", "prefix")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Keys that a query sees: those that `kind` allows by their order in the row, of the query's segment.

    kind: causal: keys up to the query. full: all. window: `window` = (left, right) keys before and after the
    query, and the one at its place. prefix: keys up to the query, and the first prefix_B [B] of each row
    (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1).
    query_segments_BT, key_segments_BS: numbers, 0 for padding; a query sees keys of its number. Both None: a
    row is one segment. One alone: the other side is 1 throughout, so that keys that are 0 are not seen.

    The output for a query that sees no key is 0.
    """

    kind: Kind = "causal"
    window: tuple[int, int] = (0, 0)
    prefix_B: jax.Array | None = None
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None

    def __post_init__(self) -> None:
        check(self.kind in KINDS, f"a mask is one of {', '.join(KINDS)}; given {self.kind!r}")
        check(min(self.window) >= 0, f"a window has no negative sides, given {self.window}")
        check(
            (self.kind == "prefix") == (self.prefix_B is not None),
            f"prefix_B [B] is given with a prefix mask and with no other; this one is {self.kind}",
        )

    @property
    def joint(self) -> bool:
        """Whether queries and keys have the same segments, or none."""
        return self.query_segments_BT is self.key_segments_BS

    def both_segments(self, batch: int, time: int, keys: int) -> tuple[jax.Array, jax.Array]:
        """Segments of queries [B, T] and of keys [B, S], a missing side being 1 throughout.

        Args:
            batch: B.
            time: T.
            keys: S.
        """
        ones = lambda size: jnp.ones((batch, size), jnp.int32)
        query_BT, key_BS = self.query_segments_BT, self.key_segments_BS
        return (
            ones(time) if query_BT is None else query_BT,
            ones(keys) if key_BS is None else key_BS,
        )

    def segments(self, batch: int, time: int, keys: int) -> jax.Array | None:
        """[B, T, S]: True where query and key are of one segment; None without segments.

        Args:
            batch: B.
            time: T.
            keys: S.
        """
        if self.query_segments_BT is None and self.key_segments_BS is None:
            return None
        return segment_mask(*self.both_segments(batch, time, keys))

    def order(self, time: int, keys: int) -> jax.Array | None:
        """[1 or B, T, S]: True where `kind` lets a query see a key; None where it sees all."""
        if self.kind == "full":
            return None
        if self.kind == "causal" and time == keys:
            return causal_mask(time)
        query_1T1 = jnp.arange(time, dtype=jnp.int32).reshape(1, -1, 1)
        key_11S = jnp.arange(keys, dtype=jnp.int32).reshape(1, 1, -1)
        if self.kind == "window":
            left, right = self.window
            return (key_11S >= query_1T1 - left) & (key_11S <= query_1T1 + right)
        seen = key_11S <= query_1T1
        return seen if self.prefix_B is None else seen | (key_11S < self.prefix_B[:, None, None])

    def visible(self, batch: int, time: int, keys: int) -> jax.Array | None:
        """[1 or B, T, S]: True where a query sees a key; None where it sees all.

        Args:
            batch: B.
            time: T.
            keys: S.
        """
        same_BTS, order_BTS = self.segments(batch, time, keys), self.order(time, keys)
        if same_BTS is None or order_BTS is None:
            return order_BTS if same_BTS is None else same_BTS
        return order_BTS & same_BTS

    def may_be_empty(self, time: int, keys: int) -> bool:
        """Whether some query may see no key: in self-attention each sees itself."""
        return not (self.joint and (time == keys or self.kind != "window"))


def causal_mask(time: int) -> jax.Array:
    """[1, T, T]: True where a key is at its query or before it."""
    index_T = jnp.arange(time, dtype=jnp.int32)
    return index_T.reshape(1, 1, -1) <= index_T.reshape(1, -1, 1)


def segment_mask(query_BT: jax.Array, key_BS: jax.Array) -> jax.Array:
    """[B, T, S]: True where query and key are of one document, by their segment numbers.

    Args:
        query_BT: segment of each query.
        key_BS: segment of each key.

    Returns:
        [B, T, S], bool.
    """
    return query_BT[:, :, None] == key_BS[:, None, :]
