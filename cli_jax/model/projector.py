"""The projector `mlp2x_gelu`: Linear, exact GELU, Linear."""

from __future__ import annotations

import flax.linen as nn
import jax

from cli_jax.model.layers import Dtype, dense, gelu_erf


class Projector(nn.Module):
    """P of docs/method.md: vision width -> language width, in two halves around the gather plan.

    GELU does not commute with the plan's interpolation, the second layer does (its weights sum to
    one), so `hidden` runs per patch and `output` per visual slot.
    """

    features: int
    dtype: Dtype
    param_dtype: Dtype
    width: int = 0  # W, of the hidden layer; 0 = D

    def setup(self) -> None:
        dtypes = (self.dtype, self.param_dtype)
        self.linear_1 = dense(self.width or self.features, ("vision_embed", "mlp"), *dtypes)
        self.linear_2 = dense(self.features, ("mlp", "embed"), *dtypes)

    def hidden(self, x_NxV: jax.Array) -> jax.Array:
        """[..., V] -> [..., W], per patch."""
        return gelu_erf(self.linear_1(x_NxV))

    def output(self, hidden_PxW: jax.Array) -> jax.Array:
        """[..., W] -> [..., D], per visual slot."""
        return self.linear_2(hidden_PxW)

    def __call__(self, x_NxV: jax.Array) -> jax.Array:
        return self.output(self.hidden(x_NxV))
