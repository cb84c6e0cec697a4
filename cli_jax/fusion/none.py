"""`none`: one vision layer, at the decoder's input only. The plain LLaVA baseline."""

from __future__ import annotations

import dataclasses

import jax

from cli_jax.config import ModelConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.model.projector import Projector


@dataclasses.dataclass(frozen=True)
class NoneConfig:
    """vision_layer: the tapped layer; -1 is V_last, what LLaVA uses."""

    vision_layer: int = -1


class NoFusion(base.Fusion):
    """P(V_k) at the input; with another `vision_layer` the single-layer study."""

    Config = NoneConfig

    @classmethod
    def vision_layers(cls, config: NoneConfig, vision: VisionConfig) -> tuple[int, ...]:
        layer = vision.last_layer if config.vision_layer == -1 else config.vision_layer
        return base.layers_of(base.taps((layer,), vision))

    @classmethod
    def flops(cls, config: NoneConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        return {"projector": base.project_flops(model, row)}

    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        (layer,) = self.vision_layers(self.model.fusion, self.model.vision)
        _, V_BxMNxV = look((), layer, base.raw, None)
        return base.Fused(base.project(V_BxMNxV, batch, projector), None)
