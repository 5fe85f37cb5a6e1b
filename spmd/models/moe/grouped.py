"""Matmuls of consecutive groups of rows, each group with a kernel of its own."""

# M rows, D input features, E groups, F output features

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from spmd.models.layers import contract


def grouped_matmul(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows [M, F], in the type of x: the first sizes[0] times kernel 0, and so on; 0 past their sum.

    The kernel's gradient is summed in the kernel's own type, as in layers.contract.

    Args:
        x_MD: rows, sorted by group.
        kernel_EDF: one kernel for each group.
        sizes_E: rows of each group, int32.

    Returns:
        [M, F].
    """
    if len(kernel_EDF) == 1:  # a TPU's compiler does not always turn one group into a plain matmul
        real_M1 = (jnp.arange(len(x_MD), dtype=sizes_E.dtype) < sizes_E[0])[:, None]
        return contract("md,df->mf", x_MD.dtype, jnp.where(real_M1, x_MD, 0), kernel_EDF[0])
    result: Any = _grouped(x_MD, kernel_EDF, sizes_E)
    return result


@jax.custom_vjp
def _grouped(x_MD, kernel_EDF, sizes_E):
    return jax.lax.ragged_dot(
        x_MD, kernel_EDF.astype(x_MD.dtype), sizes_E, preferred_element_type=x_MD.dtype
    )


def _grouped_forward(x_MD, kernel_EDF, sizes_E):
    return _grouped(x_MD, kernel_EDF, sizes_E), (x_MD, kernel_EDF, sizes_E)


def _grouped_backward(residuals, gradient_MF):
    x_MD, kernel_EDF, sizes_E = residuals
    gradient_MF = gradient_MF.astype(x_MD.dtype)
    x_gradient = _grouped(gradient_MF, kernel_EDF.swapaxes(1, 2), sizes_E)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    kernel_gradient = jax.lax.ragged_dot_general(
        x_MD, gradient_MF, sizes_E, numbers, preferred_element_type=kernel_EDF.dtype
    )
    return x_gradient, kernel_gradient, None


_grouped.defvjp(_grouped_forward, _grouped_backward)
