"""Rounding of rows of tables: unbiased, and a function of key, row and column alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spmd.core import narrow


def test_the_mean_is_exact_and_a_draw_belongs_to_its_row():
    rng = np.random.default_rng(0)
    x_KD = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    row_K = jnp.asarray(rng.choice(2**31 - 1, 64, replace=False), jnp.int32)
    keys = jax.vmap(lambda step: jax.random.key_data(jax.random.fold_in(jax.random.key(7), step)))(
        jnp.arange(4000)
    )
    rounded = np.asarray(
        jax.jit(jax.vmap(lambda key: narrow.round_rows(x_KD, row_K, key).astype(jnp.float32)))(keys)
    )
    spread = rounded.max(0) - rounded.min(0)
    share = (rounded.mean(0) - rounded.min(0)) / spread
    wanted = (np.asarray(x_KD) - rounded.min(0)) / spread
    deviation = np.sqrt(wanted * (1 - wanted) / len(keys))
    errors = (share - wanted) / deviation
    assert np.abs(errors).max() < 5 and abs(errors.mean()) < 5 / np.sqrt(errors.size)
    assert 0.9 < errors.std() < 1.1  # as of independent draws
    # Neighbouring rows and columns, and consecutive steps, are not correlated.
    up = (rounded - np.asarray(x_KD) > 0) - wanted
    for pair in ((up[:, :-1], up[:, 1:]), (up[:, :, :-1], up[:, :, 1:]), (up[:-1], up[1:])):
        product = pair[0] * pair[1]
        assert abs(product.mean()) < 5 * product.std() / np.sqrt(product.size)
    other = narrow.round_rows(x_KD[::-1], row_K[::-1], keys[0])
    np.testing.assert_array_equal(np.asarray(other)[::-1].astype(np.float32), rounded[0])
