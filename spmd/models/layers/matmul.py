"""Matmuls with a kernel whose gradient is summed in the kernel's own type."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spmd.parallel import scope


def contract(spec: str, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """einsum(spec, x, kernel), computed in the type of x and returned as `dtype`.

    The kernel's gradient is summed, over tokens and over devices, in the kernel's type. Differentiated as
    written, a bfloat16 matmul would sum the gradients of float32 parameters in bfloat16.

    Args:
        spec: einsum of two operands, every letter once in each.
        dtype: type of the result.
        x: activations, in the compute type.
        kernel: parameters; cast to the type of x.

    Returns:
        The einsum, of type `dtype`.
    """
    result: Any = _contract(spec, dtype, x, kernel)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(spec: str, dtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _contract_forward(spec, dtype, x, kernel):
    # The einsum itself: the policies of jax.checkpoint do not look into a call of _contract.
    y = jnp.einsum(spec, x, kernel.astype(x.dtype), preferred_element_type=dtype)
    return y, (x, kernel)


def _contract_backward(spec, dtype, residuals, gradient):
    x, kernel = residuals
    (x_dims, kernel_dims), out_dims = spec.split("->")[0].split(","), spec.split("->")[1]
    gradient = gradient.astype(x.dtype)
    x_gradient = jnp.einsum(f"{out_dims},{kernel_dims}->{x_dims}", gradient, kernel.astype(x.dtype))
    return x_gradient, _kernel_gradient(x_dims, x, out_dims, gradient, kernel_dims, kernel)


def _kernel_gradient(x_dims, x, out_dims, gradient, kernel_dims, kernel):
    """einsum("x,out->kernel", x, gradient), summed in the type of `kernel`."""
    dtype = kernel.dtype
    if scope.platform() != "cpu" or x.size <= gradient.size + kernel.size:
        spec = f"{x_dims},{out_dims}->{kernel_dims}"
        return jnp.einsum(spec, x, gradient, preferred_element_type=dtype)
    # XLA's CPU backend transposes the first operand by a slow copy inside the matmul's loop. So the smaller
    # operand comes first and the result is transposed; the barrier keeps XLA from swapping them back.
    swapped = "".join(sorted(kernel_dims, key=lambda letter: letter in x_dims))
    spec = f"{out_dims},{x_dims}->{swapped}"
    result = jnp.einsum(spec, gradient, x, preferred_element_type=dtype)
    return jnp.einsum(f"{swapped}->{kernel_dims}", jax.lax.optimization_barrier(result))


_contract.defvjp(_contract_forward, _contract_backward)
