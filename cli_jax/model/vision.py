"""Vision towers: SigLIP and CLIP, with any layer's hidden state on tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.config import ComputeConfig, ImageConfig, VisionConfig
from cli_jax.model import stack
from cli_jax.model.attention import attention
from cli_jax.model.layers import ACTIVATIONS, Dtype, dense, layer_norm, partitioned
from cli_jax.model.remat import layer_input

Emit = Callable[[jax.Array, Any], Any]

# 1/255 in two parts, the first so short that its product with a byte is exact. A division would do,
# but XLA may make it a product with the rounded 1/255, an ulp or two off the reference.
_BYTE = np.float32(round(2**24 / 255) / 2**24)
_BYTE_REST = np.float32(1 / 255 - float(_BYTE))


def normalize(pixels: jax.Array, image: ImageConfig) -> jax.Array:
    """uint8 [..., 3] -> float32 (x / 255 - mean) / std, as the reference image processor.

    Bit for bit where std is a power of two (SigLIP's 0.5), else to an ulp.
    """
    mean, std = jnp.array(image.image_mean), jnp.array(image.image_std)
    x = pixels.astype(jnp.float32)
    return (x * _BYTE + x * _BYTE_REST - mean) / std


class VisionEmbeddings(nn.Module):
    """Tiles [n, H, W, 3] -> tokens [n, N (+1 for CLS), V]; the patch convolution as one product."""

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, tiles: jax.Array) -> jax.Array:
        c = self.config
        n, grid, p, V = tiles.shape[0], c.grid, c.patch_size, c.hidden_size
        used = tiles[:, : grid * p, : grid * p].astype(self.dtype)  # "valid": the rest is dropped
        patches = used.reshape(n, grid, p, grid, p, 3).transpose(0, 1, 3, 2, 4, 5)
        x = PatchEmbedding(c, self.dtype, self.param_dtype, name="patch_embedding")(
            patches.reshape(n, c.num_patches, p * p * 3)
        )
        if c.model_type == "clip":
            cls = self.param(
                "class_embedding",
                partitioned(nn.initializers.normal(c.initializer_range), ("norm",)),
                (V,),
                self.param_dtype,
            )
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(self.dtype), (n, 1, V)), x], axis=1)
        position = nn.Embed(
            x.shape[1],
            V,
            param_dtype=self.param_dtype,
            embedding_init=partitioned(
                nn.initializers.normal(c.initializer_range), (None, "vision_embed")
            ),
            name="position_embedding",
        )
        return x + position.embedding.astype(self.dtype)


class PatchEmbedding(nn.Module):
    """Flattened patches [n, N, p*p*3] -> [n, N, V] with a convolution's kernel [p, p, 3, V]."""

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        c = self.config
        kernel = self.param(
            "kernel",
            partitioned(
                nn.initializers.variance_scaling(
                    1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2), out_axis=3
                ),
                (None, None, None, "vision_embed"),
            ),
            (c.patch_size, c.patch_size, 3, c.hidden_size),
            self.param_dtype,
        )
        x = patches @ kernel.reshape(-1, c.hidden_size).astype(self.dtype)
        if c.model_type == "clip":
            return x
        bias = self.param(
            "bias",
            partitioned(nn.initializers.zeros, ("norm",)),
            (c.hidden_size,),
            self.param_dtype,
        )
        return x + bias.astype(self.dtype)


class VisionAttention(nn.Module):
    """Full self-attention within a tile; q, k, v and out all have biases."""

    config: VisionConfig
    kernel: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads, V = self.config.num_attention_heads, self.config.hidden_size
        dtypes = (self.dtype, self.param_dtype)
        q, k, v = (
            dense(V, ("vision_embed", "vision_heads"), *dtypes, name=name)(x).reshape(
                *x.shape[:2], heads, V // heads
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        axes = ("vision_heads", "vision_heads")
        out = attention(q, k, v, None, causal=False, heads=axes, kernel=self.kernel)
        out = out.reshape(x.shape)
        return dense(V, ("vision_heads", "vision_embed"), *dtypes, name="out_proj")(out)


class VisionMLP(nn.Module):
    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dtypes = (self.dtype, self.param_dtype)
        x = dense(c.intermediate_size, ("vision_embed", "vision_mlp"), *dtypes, name="fc1")(x)
        x = ACTIVATIONS[c.hidden_act](x)
        return dense(c.hidden_size, ("vision_mlp", "vision_embed"), *dtypes, name="fc2")(x)


class VisionLayer(nn.Module):
    """Pre-norm block: x += attention(LN1 x); x += MLP(LN2 x)."""

    config: VisionConfig
    kernel: str
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = (self.dtype, self.param_dtype)
        norm = (self.config.layer_norm_eps, *dtypes)
        attend = VisionAttention(self.config, self.kernel, *dtypes, name="self_attn")
        x = x + attend(layer_norm(*norm, name="layer_norm1")(x))
        mlp = VisionMLP(self.config, *dtypes, name="mlp")
        return x + mlp(layer_norm(*norm, name="layer_norm2")(x))


class VisionEncoder(nn.Module):
    config: VisionConfig
    compute: ComputeConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, layers: tuple[int, ...], stop: int, emit: Emit, xs: Any, add: bool
    ) -> tuple[Any, jax.Array]:
        c = self.config
        kernel = self.compute.attention
        block = VisionLayer(c, kernel, self.dtype, self.param_dtype, parent=None)
        params = stack.stacked_params(self, "layers", block, c.num_hidden_layers, x[:1, :1])

        def body(x, layer):
            return block.apply({"params": layer}, layer_input(x)), None

        patches = slice(1, None) if c.model_type == "clip" else slice(None)
        last, outs = stack.run(
            body,
            x,
            params,
            stop=stop,
            unroll=not self.compute.scan_layers,
            points=layers,
            visit=lambda x, own: (x, emit(x[:, patches], own)),
            visits=xs,
            add=add,
            remat=self.compute.remat,
        )
        return outs, last[:, patches]


class VisionTower(nn.Module):
    """SigLIP (transformers siglip/modeling_siglip.py) or CLIP (clip/modeling_clip.py).

    Layer index k is the index into Hugging Face's `hidden_states`: 0 = embeddings, k = output of
    the k-th block, never post-normed, CLS dropped. Layers after the last tap do not run.
    `post_layernorm` is carried so that checkpoints round-trip; nothing uses it.
    """

    config: VisionConfig
    compute: ComputeConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        tiles: jax.Array,
        layers: tuple[int, ...],
        stop: int,
        emit: Emit,
        xs: Any = None,
        add: bool = False,
    ) -> tuple[Any, jax.Array]:
        """tiles float32 [n, H, W, 3] -> what `emit` makes of the tapped layers, layer `stop`.

        emit(hidden state [n, N, V], xs[i]) of the i-th of the ascending `layers`, stacked on axis
        0 or, with `add`, summed up on the way, so that only the sum is kept; and the hidden state
        [n, N, V] of layer `stop` (>= layers[-1]). A tapped hidden state is not kept beside its
        layer's input, so emit what is needed later, not the state itself.
        """
        c = self.config
        x = VisionEmbeddings(c, self.dtype, self.param_dtype, name="embeddings")(tiles)
        norm = (c.layer_norm_eps, self.dtype, self.param_dtype)
        if c.model_type == "clip":
            x = layer_norm(*norm, name="pre_layrnorm")(x)
        encoder = VisionEncoder(c, self.compute, self.dtype, self.param_dtype, name="encoder")
        if self.is_initializing():
            layer_norm(*norm, name="post_layernorm")(x)
        return encoder(x, layers, stop, emit, xs, add)
