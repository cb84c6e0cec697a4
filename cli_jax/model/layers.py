"""Small layers shared by the vision towers and the decoders, with the references' numerics.

Kernels are drawn with standard deviation 1/sqrt(fan_in); embeddings with `initializer_range`.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype
LogicalAxes = tuple[str | None, ...]


def partitioned(init: Callable, axes: LogicalAxes) -> Callable:
    """An initializer whose parameter carries logical axis names (see `parallel/rules.py`)."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    features: int,
    axes: LogicalAxes,
    dtype: Dtype,
    param_dtype: Dtype,
    *,
    use_bias: bool = True,
    name: str | None = None,
) -> nn.Dense:
    """x [..., in] -> x W + b [..., features]; `axes` are the logical axes of W [in, features]."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=partitioned(nn.initializers.lecun_normal(), axes),
        bias_init=partitioned(nn.initializers.zeros, axes[-1:]),
        name=name,
    )


def layer_norm(
    epsilon: float, dtype: Dtype, param_dtype: Dtype, name: str | None = None
) -> nn.LayerNorm:
    """LayerNorm with two-pass statistics, as torch computes them."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        scale_init=partitioned(nn.initializers.ones, ("norm",)),
        bias_init=partitioned(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class RMSNorm(nn.Module):
    """RMS norm in float32, cast down *before* the weight multiplies (transformers qwen2)."""

    epsilon: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            partitioned(nn.initializers.ones, ("norm",)),
            (x.shape[-1],),
            self.param_dtype,
        )
        return (rms_normalize(x, self.epsilon).astype(self.dtype)) * scale.astype(self.dtype)


def rms_normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in float32, without a scale."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation: SigLIP's `gelu_pytorch_tanh`."""
    return jax.nn.gelu(x, approximate=True)


def gelu_erf(x: jax.Array) -> jax.Array:
    """The exact GELU: the projector's `nn.GELU()`."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x): CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "gelu": gelu_erf,
}


def rotary_angles(
    positions: jax.Array, head_dim: int, theta: float, dtype: Dtype
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, L, 1, head_dim] of the rotary embedding; angles in float32, then cast."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle_BxLxh = positions[..., None].astype(jnp.float32) / (theta**exponent)
    angle_BxLx1xH = jnp.concatenate([angle_BxLxh, angle_BxLxh], axis=-1)[:, :, None, :]
    return jnp.cos(angle_BxLx1xH).astype(dtype), jnp.sin(angle_BxLx1xH).astype(dtype)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies the rotary embedding to x [B, L, heads, head_dim], in half-split form."""
    cos, sin = rotary
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
