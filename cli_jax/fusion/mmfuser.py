"""`mmfuser`: deformable cross-attention from the deep vision layer to shallower ones, per tile.

    A   = deform(norm_q(Q), norm_f(F_1..F_L))             Q: the deep layer, F_l: the shallower ones
    out = Q + gamma1 * (A + gamma2 * deform(norm(A), norm(A)))

and `out` takes V_last's place before the projector. gamma1 = gamma2 = 0 at the start: the model is
`none`. The parameters are those of MMFuser's MSCrossAttnBlock (arXiv 2410.11829; yuecao0119/MMFuser
ms_cross_attn.py and ms_deform_attn.py), under its names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.config import ModelConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.model.layers import Dtype, layer_norm, partitioned
from cli_jax.model.projector import Projector

EPSILON = 1e-6  # of the norms


@dataclasses.dataclass(frozen=True)
class MMFuserConfig:
    """layers: vision layers; the deepest one asks, the others are sampled
    heads, points: of the deformable attention; heads = 0 means as many as the tower has
    """

    layers: base.LayerSpec = "at:13%,35%,57%,78%,100%"  # CLIP ViT-L/14: 3, 8, 13, 18, 23
    heads: int = 0
    points: int = 4

    def __post_init__(self) -> None:
        for name, least in (("heads", 0), ("points", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"fusion.mmfuser.{name} is {getattr(self, name)}: it must be >= {least}"
                )


class MMFuser(base.Fusion):
    """MMFuser's block on every tile before the projector.

    Without gradient at the start: everything but gamma1, behind gamma1 = 0.
    """

    Config = MMFuserConfig

    @classmethod
    def vision_layers(cls, config: MMFuserConfig, vision: VisionConfig) -> tuple[int, ...]:
        layers = base.layers_of(base.taps(config.layers, vision))
        if len(layers) < 2:
            raise ValueError(
                f"fusion.mmfuser.layers is {config.layers!r}, layer {layers[0]} of this tower: name"
                " at least one shallower layer, too"
            )
        cls.heads(config, vision)
        return layers

    @classmethod
    def heads(cls, config: MMFuserConfig, vision: VisionConfig) -> int:
        """H; raises ValueError if it does not divide the tower's width."""
        heads = config.heads or vision.num_attention_heads
        if vision.hidden_size % heads:
            raise ValueError(
                f"fusion.mmfuser.heads is {heads}: the tower's width {vision.hidden_size} is not "
                "divisible by it"
            )
        return heads

    @classmethod
    def flops(cls, config: MMFuserConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        V, N = model.vision.hidden_size, model.vision.num_patches
        points = cls.heads(config, model.vision) * config.points

        def deform(levels: int) -> float:
            linear = V * levels + 3 * points * levels + V  # value, offsets and weights, output
            return 2.0 * N * V * (linear + levels * N)

        levels = len(cls.vision_layers(config, model.vision)) - 1
        block = row.tiles * (deform(levels) + deform(1))
        return {"projector": base.project_flops(model, row), "fusion": block}

    def setup(self) -> None:
        c, vision = self.model.fusion, self.model.vision
        dtypes = (self.dtype, self.param_dtype)
        heads = self.heads(c, vision)
        self.query_norm = layer_norm(EPSILON, *dtypes)
        self.feat_norm = layer_norm(EPSILON, *dtypes)
        self.cross_attn = MSDeformAttn(heads, c.points, *dtypes)
        self.norm1 = layer_norm(EPSILON, *dtypes)
        self.self_attn = MSDeformAttn(heads, c.points, *dtypes)
        zeros = partitioned(nn.initializers.zeros, ("norm",))
        self.gamma1 = self.param("gamma1", zeros, (vision.hidden_size,), self.param_dtype)
        self.gamma2 = self.param("gamma2", zeros, (vision.hidden_size,), self.param_dtype)

    def fuse(self, deep_BxNxV: jax.Array, shallow_LxBxNxV: jax.Array) -> jax.Array:
        """One tile of every row: its deep layer with what it takes from the shallower ones."""
        attn = self.cross_attn(self.query_norm(deep_BxNxV), self.feat_norm(shallow_LxBxNxV))
        again = self.norm1(attn)
        attn = attn + self.gamma2.astype(self.dtype) * self.self_attn(again, again[None])
        return deep_BxNxV + self.gamma1.astype(self.dtype) * attn

    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        *shallow, deep = self.vision_layers(self.model.fusion, self.model.vision)
        shallow_LxBxMNxV, deep_BxMNxV = look(tuple(shallow), deep, base.raw, None)
        B, MN, V = deep_BxMNxV.shape

        def by_tile(x: jax.Array) -> jax.Array:  # [..., B, M*N, V] -> [M, ..., B, N, V]
            tiles = x.reshape(*x.shape[:-2], -1, self.model.vision.num_patches, V)
            return jnp.moveaxis(tiles, -3, 0)

        tiles = by_tile(deep_BxMNxV), by_tile(shallow_LxBxMNxV)
        if self.is_initializing():  # parameters are made outside of scans
            self.fuse(*(x[0] for x in tiles))
        alone, variables = self.unbind()
        fused_MxBxNxV = self.each(lambda tile: alone.apply(variables, *tile, method="fuse"), tiles)
        fused_BxMNxV = jnp.moveaxis(fused_MxBxNxV, 0, 1).reshape(B, MN, V)
        return base.Fused(base.project(fused_BxMNxV, batch, projector), None)


class MSDeformAttn(nn.Module):
    """Deformable attention: every query reads some points of every level, near its own patch.

    (query [B, N, V], levels [L, B, N, V]) -> [B, N, V]. A head of a query has `points` points a
    level, at learned offsets (in patches) from the query's own place, and a softmax over all of
    them; a point's value is the bilinear mean of the patches around it, zero outside of the tile.
    """

    heads: int
    points: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, query_BxNxV: jax.Array, source_LxBxNxV: jax.Array) -> jax.Array:
        (L, B, N, V), H, p = source_LxBxNxV.shape, self.heads, self.points
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        offset_BxNxHxLxpx2 = self._linear("sampling_offsets", H * L * p * 2, zeros, self._ring(L))(
            query_BxNxV
        ).reshape(B, N, H, L, p, 2)
        score_BxNxHxLp = self._linear("attention_weights", H * L * p, zeros)(query_BxNxV)
        weight_BxNxHxLp = jax.nn.softmax(
            score_BxNxHxLp.reshape(B, N, H, L * p).astype(jnp.float32), axis=-1
        )
        value_LxBxNxV = self._linear("value_proj", V, xavier)(source_LxBxNxV)
        out_BxNxHxd = sample(
            value_LxBxNxV.reshape(L, B, N, H, V // H),
            offset_BxNxHxLxpx2,
            weight_BxNxHxLp.reshape(B, N, H, L, p),
        )
        out_BxNxV = out_BxNxHxd.reshape(B, N, V).astype(self.dtype)
        return self._linear("output_proj", V, xavier, inward=False)(out_BxNxV)

    def _linear(
        self,
        name: str,
        features: int,
        kernel: Callable,
        bias: Callable = nn.initializers.zeros,
        inward: bool = True,
    ) -> nn.Dense:
        axes = ("vision_embed", "vision_heads") if inward else ("vision_heads", "vision_embed")
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=partitioned(kernel, axes),
            bias_init=partitioned(bias, axes[1:]),
            name=name,
        )

    def _ring(self, levels: int) -> Callable:
        """Offsets at the start: every head in a direction of its own, its points 1, 2, ... off."""
        angle_H = np.arange(self.heads) * (2 * np.pi / self.heads)
        direction_Hx2 = np.stack([np.cos(angle_H), np.sin(angle_H)], axis=-1)
        direction_Hx2 /= np.abs(direction_Hx2).max(axis=-1, keepdims=True)
        steps_p = np.arange(1, self.points + 1)
        ring_Hxpx2 = direction_Hx2[:, None] * steps_p[:, None]
        ring_HxLxpx2 = np.repeat(ring_Hxpx2[:, None], levels, axis=1)
        return lambda _, shape, dtype: jnp.asarray(ring_HxLxpx2, dtype).reshape(shape)


def sample(
    value_LxBxNxHxd: jax.Array, offset_BxNxHxLxpx2: jax.Array, weight_BxNxHxLxp: jax.Array
) -> jax.Array:
    """Weighted sums [B, N, H, d] of bilinear samples at the query's place plus its offsets (x, y).

    In float32. Equals torch's `grid_sample(align_corners=False, padding_mode="zeros")` around patch
    centers. A sample's weight of a patch is a product of two hats, max(0, 1 - distance) in x and in
    y, so the samples of a head and level are one dense matrix [N, N] times the values: no gather,
    and no scatter-add in the backward pass, for 2 L N^2 V FLOPs a tile (1% of SigLIP's own). At a
    patch center, where the hat has a kink, the derivative is the mean of both sides.
    """
    N = offset_BxNxHxLxpx2.shape[1]
    side = math.isqrt(N)
    place_Nx2 = np.stack([np.arange(N) % side, np.arange(N) // side], -1).astype(np.float32)
    at = offset_BxNxHxLxpx2.astype(jnp.float32) + place_Nx2[:, None, None, None]
    matrix_BxHxLxNxN = jnp.zeros((), jnp.float32)
    for point in range(offset_BxNxHxLxpx2.shape[4]):
        x, y = (jnp.moveaxis(at[..., point, axis], 1, 3)[..., None] for axis in (0, 1))
        weight = jnp.moveaxis(weight_BxNxHxLxp[..., point], 1, 3)[..., None]
        hats = _hat(x - place_Nx2[:, 0]) * _hat(y - place_Nx2[:, 1])
        matrix_BxHxLxNxN = matrix_BxHxLxNxN + weight * hats
    value = value_LxBxNxHxd.astype(jnp.float32)
    return jnp.einsum("bhlqs,lbshd->bqhd", matrix_BxHxLxNxN, value, precision="highest")


def _hat(distance: jax.Array) -> jax.Array:
    return jnp.maximum(0, 1 - jnp.abs(distance))
