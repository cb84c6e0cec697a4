"""`adapter`: a control for `cli`. New parameters at the same places that are told nothing new.

    h[pos] += B_t A_t h[pos]           before decoder layer t, visual positions only

A LoRA branch on the residual stream: it sees no vision layer but the last one, which is already in
h. What `cli` gains over it is owed to what is injected, not to parameters beside the decoder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.fusion.low_rank import LowRank
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import take_or_zero
from cli_jax.model.projector import Projector


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """inject: decoder layers as those of `cli`; rank: of every layer's branch."""

    inject: base.LayerSpec = "every:3"
    rank: int = 64

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"fusion.adapter.rank is {self.rank}: it must be >= 1")


class Adapter(base.Fusion):
    """Starts as `none`, since B = 0. Without gradient at the start: lora_A, behind it."""

    Config = AdapterConfig

    @classmethod
    def vision_layers(cls, config: AdapterConfig, vision: VisionConfig) -> tuple[int, ...]:
        return (vision.last_layer,)

    @classmethod
    def decoder_layers(cls, config: AdapterConfig, text: TextConfig) -> tuple[int, ...]:
        return base.injection_layers(config.inject, text)

    @classmethod
    def flops(cls, config: AdapterConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        points = len(cls.decoder_layers(config, model.text))
        branch = 4.0 * config.rank * row.length * model.text.hidden_size
        return {"projector": base.project_flops(model, row), "fusion": points * branch}

    @nn.compact
    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        c: AdapterConfig = self.model.fusion
        points = self.decoder_layers(c, self.model.text)
        D = self.model.text.hidden_size
        branches = LowRank("points", len(points), c.rank, "embed", self.param_dtype, name="branch")
        patch_BxPx1 = base.is_patch(batch)[..., None].astype(self.dtype)
        patch_BxLx1 = take_or_zero(patch_BxPx1, batch["visual_index"])

        def inject(h_BxLxD: jax.Array, point: Any) -> tuple[jax.Array, None]:
            A_Dxr, B_rxD = (w.astype(self.dtype) for w in point)
            return h_BxLxD + patch_BxLx1 * (h_BxLxD @ A_Dxr @ B_rxD), None

        _, V_BxMNxV = look((), self.model.vision.last_layer, base.raw, None)
        features_BxPxD = base.project(V_BxMNxV, batch, projector)
        return base.Fused(features_BxPxD, Injection(points, inject, branches(D, D)))
