"""`layer_concat`: a shallow, a middle and a deep layer side by side, and one linear layer.

    feature[p] = W [V_k1 ; ... ; V_km][p] + b        at the input only, in place of the projector

The fusion of the visual-layer-selection paper (arXiv 2504.21447): layers 3, 18 and 23 of the 24 of
CLIP ViT-L/14. Being linear, W commutes with the gather plan (docs/method.md section 0): what is
kept of a layer are its features on visual slots, [P, V], made where the layer arises.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.config import ModelConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.model.layers import dense
from cli_jax.model.projector import Projector


@dataclasses.dataclass(frozen=True)
class LayerConcatConfig:
    """layers: vision layers, from shallow to deep: a list, `all`, `every:m`, or shares of depth."""

    layers: base.LayerSpec = "at:13%,78%,100%"  # CLIP ViT-L/14: 3, 18, 23


class LayerConcat(base.Fusion):
    """One linear layer over the channels of all layers; the model has no projector.

    Every parameter has a gradient at the start.
    """

    Config = LayerConcatConfig

    @classmethod
    def vision_layers(cls, config: LayerConcatConfig, vision: VisionConfig) -> tuple[int, ...]:
        return base.layers_of(base.taps(config.layers, vision))

    @classmethod
    def has_plain_projector(cls, config: LayerConcatConfig) -> bool:
        return False

    @classmethod
    def flops(
        cls, config: LayerConcatConfig, model: ModelConfig, row: base.Row
    ) -> dict[str, float]:
        V = len(cls.vision_layers(config, model.vision)) * model.vision.hidden_size
        product = 2.0 * row.visual * V * model.text.hidden_size
        return {"fusion": product + base.plan_flops(V, row.visual)}

    @nn.compact
    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        layers = self.vision_layers(self.model.fusion, self.model.vision)
        gathered_KxBxPxV, _ = look(
            layers, layers[-1], lambda V_BxMNxV, _: base.gather_patches(V_BxMNxV, batch), None
        )
        K, B, P, V = gathered_KxBxPxV.shape
        concat_BxPxKV = jnp.moveaxis(gathered_KxBxPxV, 0, 2).reshape(B, P, K * V)
        linear = dense(
            self.model.text.hidden_size,
            ("vision_embed", None),
            self.dtype,
            self.param_dtype,
            name="linear",
        )
        features_BxPxD = (
            linear(concat_BxPxKV) * base.is_patch(batch)[..., None]
        )  # no bias elsewhere
        return base.Fused(features_BxPxD, None)
