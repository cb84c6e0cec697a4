"""Gathers whose backward pass is a gather too: no scatter-add, so deterministic and fast.

All are per row (vmapped over B): a gather out of one flat sharded tile axis makes XLA all-reduce
the whole patch gradient, the per-row form needs no collective.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def take_or_zero(x_BxNxD: jax.Array, index_BxR: jax.Array) -> jax.Array:
    """x[b, index[b, r]], and zeros of its dtype where the index points past the end."""
    taken = jnp.take_along_axis(
        x_BxNxD, jnp.minimum(index_BxR, x_BxNxD.shape[1] - 1)[:, :, None], axis=1
    )
    return jnp.where((index_BxR < x_BxNxD.shape[1])[:, :, None], taken, jnp.zeros((), taken.dtype))


@jax.custom_vjp
def place(x_BxNxD: jax.Array, index_BxR: jax.Array, inverse_BxN: jax.Array) -> jax.Array:
    """y[b, r] = x[b, index[b, r]], zero where index = N; `inverse` is the same map read backward.

    The map must be one to one: inverse[b, n] is the r with index[b, r] = n, or R if there is none.
    """
    return take_or_zero(x_BxNxD, index_BxR)


place.defvjp(
    lambda x, index, inverse: (take_or_zero(x, index), inverse),
    lambda inverse, grad_BxRxD: (take_or_zero(grad_BxRxD, inverse), None, None),
)


@jax.custom_vjp
def apply_plan(
    x_BxNxD: jax.Array,
    index_BxPx4: jax.Array,
    weight_BxPx4: jax.Array,
    inverse_BxNxR: jax.Array,
) -> jax.Array:
    """The gather plan: y[b, p] = sum_c weight[b, p, c] x[b, index[b, p, c]], summed in float32.

    `inverse` lists the at most R entries p*4+c that read each patch with weight (4P = none); see
    `image/anyres.py`. The weights are constants of the picture's size: no gradient flows to them.
    """
    return _weighted_sum(x_BxNxD, index_BxPx4, weight_BxPx4)


def _weighted_sum(x_BxNxD: jax.Array, index_BxPxC: jax.Array, weight_BxPxC: jax.Array) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for c in range(index_BxPxC.shape[-1]):
        corner_BxPxD = jnp.take_along_axis(x_BxNxD, index_BxPxC[:, :, c, None], axis=1)
        total = total + weight_BxPxC[:, :, c, None] * corner_BxPxD
    return total.astype(x_BxNxD.dtype)


def _apply_plan_forward(x, index, weight, inverse):
    return _weighted_sum(x, index, weight), (weight, inverse)


def _apply_plan_backward(residuals, grad_BxPxD):
    weight_BxPx4, inverse_BxNxR = residuals
    B, N, R = inverse_BxNxR.shape
    entries = weight_BxPx4.shape[1] * 4
    flat_BxE = jnp.pad(weight_BxPx4.reshape(B, entries), ((0, 0), (0, 1)))
    weight_BxNxR = jnp.take_along_axis(flat_BxE, inverse_BxNxR.reshape(B, N * R), axis=1)
    slot_BxNxR = jnp.minimum(inverse_BxNxR, entries - 1) // 4
    grad_x = _weighted_sum(grad_BxPxD, slot_BxNxR, weight_BxNxR.reshape(B, N, R))
    return grad_x, None, None, None


apply_plan.defvjp(_apply_plan_forward, _apply_plan_backward)
