"""Combining the gradients of several loss terms into one update, from the inner products between them."""

# K loss terms

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spmd.core import tree

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combine:
    """Base of the ways to combine the gradients of K loss terms: a weighted sum of them.

    A subclass says which weights follow from the inner products. Strategies call `join` between the
    reduction and the update, on gradients that are already summed over all devices and microbatches.
    """

    def weights(self, gram_KK: jax.Array, key: jax.Array) -> jax.Array:
        """Factors of the gradients in their sum.

        Args:
            gram_KK: [K, K] inner products of the gradients, float32 at least.
            key: of this step, the same on all devices.

        Returns:
            [K].
        """
        raise NotImplementedError(f"{type(self).__name__} has no method weights")

    def join(
        self, grads: PyTree, terms: Sequence[str], key: jax.Array
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Combine the gradients of the loss terms.

        Args:
            grads: [K, ...] for each leaf.
            terms: names of the K loss terms.
            key: as `weights` takes it.

        Returns:
            The combined gradient, and of the gradients before grad_norm/TERM and grad_cosine/TERM/TERM.
        """
        gram_KK = gram(grads)
        norm_K = jnp.sqrt(jnp.diagonal(gram_KK))
        metrics = {f"grad_norm/{term}": norm_K[i] for i, term in enumerate(terms)}
        for i, first in enumerate(terms):
            for j, second in enumerate(terms[:i]):
                product = norm_K[i] * norm_K[j]
                cosine = gram_KK[i, j] / jnp.where(product > 0, product, 1)
                metrics[f"grad_cosine/{second}/{first}"] = cosine
        weight_K = self.weights(gram_KK, key)

        def total(grad: jax.Array) -> jax.Array:
            by_term = weight_K.astype(grad.dtype).reshape(-1, *(1,) * (grad.ndim - 1))
            return (grad * by_term).sum(0)

        return jax.tree.map(total, grads), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCGrad(Combine):
    """Gradient surgery (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    Each gradient loses its component along every other one that it conflicts with (a negative inner
    product), in an order drawn for each step; then all are added. Every projected gradient stays a
    combination of the original ones, so that inner products suffice.
    """

    def weights(self, gram_KK: jax.Array, key: jax.Array) -> jax.Array:
        num = gram_KK.shape[0]

        def project(i: jax.Array) -> jax.Array:
            """[K] coefficients of gradient i after its projections."""
            order_K = jax.random.permutation(jax.random.fold_in(key, i), num)

            def step(coefficient_K: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
                inner = (coefficient_K * gram_KK[:, j]).sum()
                conflict = (j != i) & (inner < 0)
                square = jnp.where(gram_KK[j, j] > 0, gram_KK[j, j], 1)
                along = jnp.where(conflict, inner / square, 0)
                return coefficient_K.at[j].add(-along), None

            return jax.lax.scan(step, jax.nn.one_hot(i, num, dtype=gram_KK.dtype), order_K)[0]

        return jax.vmap(project)(jnp.arange(num)).sum(0)


def gram(grads: PyTree) -> jax.Array:
    """[K, K] inner products of gradients whose leaves are [K, ...]; summed in float32 at least."""

    def products(grad: jax.Array) -> jax.Array:
        grad = grad.astype(tree.at_least_float32(grad.dtype))
        num = grad.shape[0]
        # Sums of products, since a TPU's matmul would round the operands to bfloat16.
        pairs = {(i, j): jnp.sum(grad[i] * grad[j]) for i in range(num) for j in range(i + 1)}
        row = lambda i: jnp.stack([pairs[max(i, j), min(i, j)] for j in range(num)])
        return jnp.stack([row(i) for i in range(num)])

    leaves = [products(leaf) for leaf in jax.tree.leaves(grads)]
    return sum(leaves[1:], start=leaves[0])
