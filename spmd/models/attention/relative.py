"""Relative position bias of T5: a number for each head and bucket of distances, added to the scores."""

# B batch, T time, S time of keys, H heads, R buckets

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spmd.parallel import scope


class RelativeBias(NamedTuple):
    """Bias of a stack, shared by its layers (Raffel et al. 2020, arXiv 1910.10683, section 2.1).

    table_RH: [R, H]. both: whether keys behind the query have buckets of their own (an encoder). distance:
    all distances from this one on share a bucket. bias_HTS: that of a row's tokens, once `with_row` has it.
    """

    table_RH: jax.Array
    both: bool
    distance: int
    bias_HTS: jax.Array | None = None

    def with_row(self, time: int) -> RelativeBias:
        """With the bias of the tokens of a row, so that the layers share it.

        Args:
            time: T.
        """
        places_T = jnp.arange(time, dtype=jnp.int32)
        bias_1HTT = self.between(places_T.reshape(1, -1, 1), places_T.reshape(1, 1, -1))
        return self._replace(bias_HTS=scope.constrain(bias_1HTT[0], "heads", None, None))

    def of_row(self, query_T: jax.Array, key_S: jax.Array) -> jax.Array:
        """[H, T, S] of a row's tokens, as attention's `bias`; distances are those along the row.

        Args:
            query_T: places of queries, 0, 1, ...
            key_S: those of keys.

        Returns:
            [H, T, S].
        """
        del query_T, key_S
        assert self.bias_HTS is not None
        return self.bias_HTS

    def between(self, query_BT1: jax.Array, key_B1S: jax.Array) -> jax.Array:
        """[B, H, T, S] by the positions of queries and keys.

        Args:
            query_BT1: positions of queries [B, T, 1].
            key_B1S: positions of keys [B or 1, 1, S].

        Returns:
            [B, H, T, S].
        """
        table_RH = scope.constrain(self.table_RH, None, "heads")
        ahead_BTS = key_B1S - query_BT1
        buckets = table_RH.shape[0] // (2 if self.both else 1)
        back_BTS = jnp.abs(ahead_BTS) if self.both else jnp.maximum(-ahead_BTS, 0)
        of_distance = jnp.asarray(bucket_of_distance(buckets, self.distance))
        bucket_BTS = of_distance[jnp.minimum(back_BTS, self.distance)]
        if self.both:
            bucket_BTS += jnp.where(ahead_BTS > 0, buckets, 0).astype(jnp.int32)
        return jnp.moveaxis(table_RH[bucket_BTS], -1, 1)


def bucket_of_distance(buckets: int, distance: int) -> np.ndarray:
    """int32 [distance + 1]: the bucket of each distance; half hold one each, the others widen by a logarithm.

    In float32 and in the order of T5's own code, since a distance may lie on a bucket's bound.

    Args:
        buckets: how many.
        distance: this one and all beyond have the last bucket.
    """
    exact = buckets // 2
    each = np.arange(distance + 1, dtype=np.float32)
    share = np.log(np.maximum(each, exact) / np.float32(exact)) / np.float32(
        math.log(distance / exact)
    )
    wide = exact + (share * np.float32(buckets - exact)).astype(np.int32)
    return np.where(each < exact, each.astype(np.int32), np.minimum(wide, buckets - 1)).astype(
        np.int32
    )
