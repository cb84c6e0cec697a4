"""The two towers: a picture and a caption become points on one sphere.

Batches are those of cli_jax/batch.py with one captioned picture per row (template `plain`). The
vision tower has the name and the shape that it has in a vision-language model, so that
`config.init_from` takes it out of a workdir by itself; everything else here is left behind.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.batch import IGNORE
from cli_jax.config import ComputeConfig, ModelConfig, VisionConfig
from cli_jax.model.attention import plain_attention
from cli_jax.model.decoder import Decoder
from cli_jax.model.layers import Dtype, dense, layer_norm, partitioned
from cli_jax.model.vision import VisionMLP, VisionTower, normalize

Batch = dict[str, jax.Array]


class Embedded(NamedTuple):
    """picture, caption: float32 [B, D] of length 1. same [B, B]: captions that are equal.

    logits [picture, caption] float32 [B, B]. used [B]: rows with a caption.
    """

    picture: jax.Array
    caption: jax.Array
    logits: jax.Array
    same: jax.Array
    used: jax.Array


class TwoTowers(nn.Module):
    """SigLIP in small; the caption's tower is a decoder whose last position speaks for it."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, batch: Batch) -> Embedded:
        c, compute = self.config, self.compute
        dtypes = jnp.dtype(compute.dtype), jnp.dtype(compute.param_dtype)
        width = c.text.hidden_size

        pixels = batch["pixel_values"]
        B, M = pixels.shape[:2]
        tower = VisionTower(c.vision, compute, *dtypes, name="vision_tower")
        tiles = normalize(pixels.reshape(B * M, *pixels.shape[2:]), c.image)
        _, last_TxNxV = tower(tiles, (), c.vision.last_layer, lambda x, _: x)
        pooled_TxV = AttentionPool(c.vision, *dtypes, name="pool")(last_TxNxV)
        picture = JoinTiles(width, *dtypes, name="join")(
            pooled_TxV.reshape(B, M, -1), tiles_in_use(batch)
        )

        ids_BxC, used_BxC = captions(batch, c.vision.num_patches)
        decoder = Decoder(c.text, compute, *dtypes, name="text_tower")
        positions = jnp.broadcast_to(jnp.arange(ids_BxC.shape[1]), ids_BxC.shape)
        # One segment: what is behind a caption's end comes too late to be seen.
        hidden_BxCxD, _, _ = decoder(decoder.embed(ids_BxC), positions, jnp.ones_like(ids_BxC))
        last_B = jnp.maximum(jnp.sum(used_BxC, axis=1) - 1, 0)
        last_BxD = jnp.take_along_axis(hidden_BxCxD, last_B[:, None, None], axis=1)[:, 0]
        caption = dense(width, ("embed", None), *dtypes, name="text_head")(last_BxD)

        picture, caption = unit(picture), unit(caption)
        return Embedded(
            picture,
            caption,
            Pairs(name="pairs")(picture, caption),
            equal_rows(jnp.where(used_BxC, ids_BxC, IGNORE)),
            used_BxC[:, 0],
        )


class AttentionPool(nn.Module):
    """Patches [T, N, V] -> [T, V]: one learned query per head, then an MLP with a residual.

    transformers' SiglipMultiheadAttentionPoolingHead (the paper's MAP head), behind a norm of its
    own: the tower emits hidden states without one.
    """

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x_TxNxV: jax.Array) -> jax.Array:
        c, dtypes = self.config, (self.dtype, self.param_dtype)
        T, _, V = x_TxNxV.shape
        heads = c.num_attention_heads
        probe_V = self.param(
            "probe", partitioned(nn.initializers.normal(1.0), ("norm",)), (V,), self.param_dtype
        )

        def project(x: jax.Array, name: str) -> jax.Array:
            y = dense(V, ("vision_embed", "vision_heads"), *dtypes, name=name)(x)
            return y.reshape(*x.shape[:2], heads, V // heads)

        x_TxNxV = layer_norm(c.layer_norm_eps, *dtypes, name="norm")(x_TxNxV)
        probe_Tx1xV = jnp.broadcast_to(probe_V.astype(self.dtype), (T, 1, V))
        pooled = plain_attention(
            project(probe_Tx1xV, "q_proj"), project(x_TxNxV, "k_proj"), project(x_TxNxV, "v_proj")
        )
        out = dense(V, ("vision_heads", "vision_embed"), *dtypes, name="out_proj")
        x_TxV = out(pooled.reshape(T, V))
        mlp = VisionMLP(c, *dtypes, name="mlp")
        return x_TxV + mlp(layer_norm(c.layer_norm_eps, *dtypes, name="mlp_norm")(x_TxV))


class JoinTiles(nn.Module):
    """Tiles [B, M, V] -> the picture [B, D]: a linear map for each place, summed over tiles in use.

    The tower sees one tile at a time, so only this map can tell the left box from the right one.
    """

    features: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x_BxMxV: jax.Array, in_use_BxM: jax.Array) -> jax.Array:
        _, M, V = x_BxMxV.shape
        kernel_MxVxD = self.param(
            "kernel",
            partitioned(
                nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0),
                (None, "vision_embed", None),
            ),
            (M, V, self.features),
            self.param_dtype,
        )
        x = x_BxMxV * in_use_BxM[..., None]
        return jnp.einsum("BMV,MVD->BD", x, kernel_MxVxD.astype(self.dtype))


class Pairs(nn.Module):
    """Logits [picture, caption] = exp(t') picture . caption + b; starts at t' = log 10, b = -10."""

    @nn.compact
    def __call__(self, picture_BxD: jax.Array, caption_BxD: jax.Array) -> jax.Array:
        # Named so that the optimizer's rule for scales and biases leaves them undecayed.
        scale = self.param("scale", nn.initializers.constant(jnp.log(10.0)), ())
        bias = self.param("bias", nn.initializers.constant(-10.0), ())
        return jnp.exp(scale) * picture_BxD @ caption_BxD.T + bias


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def equal_rows(x_BxC: jax.Array) -> jax.Array:
    """bool [B, B]: rows of x that are equal."""
    return jnp.all(x_BxC[:, None] == x_BxC[None, :], axis=-1)


def tiles_in_use(batch: Batch) -> jax.Array:
    """bool [B, M]: tiles of which some visual slot reads a patch, not padding."""
    B, M = batch["pixel_values"].shape[:2]
    none = 4 * batch["plan_index"].shape[1]
    return jnp.any(batch["plan_inverse"].reshape(B, M, -1) < none, axis=-1)


def captions(batch: Batch, patches: int) -> tuple[jax.Array, jax.Array]:
    """Caption ids int32 [B, C] from position 0 on, 0 behind their ends, and which are in use.

    A caption is what has labels in its row. A picture takes at least its base view's `patches`
    positions of a row, so no caption is longer than C = L - patches.
    """
    labels_BxL = batch["labels"]
    is_caption_BxL = labels_BxL != IGNORE
    L = labels_BxL.shape[1]
    at_BxC = jnp.argmax(is_caption_BxL, axis=1)[:, None] + jnp.arange(L - patches)
    inside = jnp.arange(L - patches) < jnp.sum(is_caption_BxL, axis=1)[:, None]
    ids = jnp.take_along_axis(labels_BxL, jnp.minimum(at_BxC, L - 1), axis=1)
    return jnp.where(inside, ids, 0), inside
