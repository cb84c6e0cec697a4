"""`sli`: static one-to-one, shallow. Some vision layers, each into one of the first decoder layers.

    h[pos] += P_i(V_{k_i})[pos]        before decoder layer start + i, visual positions only

Every tap k_i has an MLP P_i of its own that starts as a copy of the projector. No gates. The
relative in production is Qwen3-VL's deepstack (transformers qwen3_vl/modeling_qwen3_vl.py): vision
layers 8, 16 and 24 of 27, added after decoder layers 0, 1 and 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.model import stack
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import place
from cli_jax.model.projector import Projector

_PROJECTORS = "fusion/projectors/"


@dataclasses.dataclass(frozen=True)
class SLIConfig:
    """The i-th tap is added before decoder layer `start` + i.

    taps    vision layers, ascending: a list, whose entries are layers or lists of layers (their
            mean), or shares of the tower's depth
    start   the first decoder layer
    """

    taps: base.TapSpec = "at:30%,60%,90%"
    start: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.taps, str) and not self.taps.startswith("at:"):
            raise ValueError(
                f"fusion.sli.taps is {self.taps!r}: every tap has its decoder layer, so name them "
                "by a list or by shares like 'at:30%,60%,90%'"
            )

    @property
    def count(self) -> int:
        """m, the number of taps."""
        return len(base.shares(self.taps) if isinstance(self.taps, str) else self.taps)


class SLI(base.Fusion):
    """One MLP per tap, into one decoder layer each; the decoder's input stays that of `none`.

    Every parameter has a gradient at the start.
    """

    Config = SLIConfig

    @classmethod
    def taps(cls, config: SLIConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        """The taps in the order of their decoder layers, each as the layers whose mean it is."""
        taps = base.taps(config.taps, vision)
        named = config.taps if isinstance(config.taps, tuple) else taps
        if taps != tuple(base.taps((tap,), vision)[0] for tap in named):
            raise ValueError(
                f"fusion.sli.taps {config.taps} do not ascend: the i-th goes to decoder layer "
                f"{config.start} + i, shallow ones first"
            )
        if len(taps) != config.count:
            raise ValueError(
                f"fusion.sli.taps {config.taps!r} are only {len(taps)} layers of this tower's "
                f"{vision.last_layer}: name fewer"
            )
        return taps

    @classmethod
    def vision_layers(cls, config: SLIConfig, vision: VisionConfig) -> tuple[int, ...]:
        return base.layers_of((*cls.taps(config, vision), (vision.last_layer,)))

    @classmethod
    def decoder_layers(cls, config: SLIConfig, text: TextConfig) -> tuple[int, ...]:
        points = range(config.start, config.start + config.count)
        if points[0] < 0 or points[-1] >= text.num_hidden_layers:
            raise ValueError(
                f"fusion.sli.start={config.start} and {config.count} taps need the decoder layers "
                f"{points[0]}..{points[-1]}: this model has 0..{text.num_hidden_layers - 1}"
            )
        return tuple(points)

    @classmethod
    def banked_taps(cls, config: SLIConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        return cls.taps(config, vision)

    @classmethod
    def bank_reads(cls, config: SLIConfig, model: ModelConfig, row: base.Row) -> float:
        each = row.visual * model.text.hidden_size
        return float(config.count * each)  # every injection reads its own

    @classmethod
    def copies(cls, config: SLIConfig, paths: Iterable[str]) -> dict[str, base.Copy]:
        return {
            path: base.Copy("multi_modal_projector/" + path.removeprefix(_PROJECTORS))
            for path in paths
            if path.startswith(_PROJECTORS)
        }

    @classmethod
    def flops(cls, config: SLIConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        once = base.project_flops(model, row)
        return {"projector": once, "fusion": config.count * once}

    @nn.compact
    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        c: SLIConfig = self.model.fusion
        taps = self.taps(c, self.model.vision)
        alone = projector.clone(parent=None)
        one_patch = jnp.zeros((1, 1, self.model.vision.hidden_size))
        own = stack.stacked_params(self, "projectors", alone, len(taps), one_patch)

        def align(V_BxMNxV: jax.Array, params: Any) -> jax.Array:
            return base.project(V_BxMNxV, batch, alone.bind({"params": params}))

        bank_KxBxPxD, last_BxMNxV = self.look_at_taps(look, taps, align, own)

        def inject(h_BxLxD: jax.Array, Vhat_BxPxD: jax.Array) -> tuple[jax.Array, None]:
            placed_BxLxD = place(Vhat_BxPxD, batch["visual_index"], batch["visual_position"])
            return h_BxLxD + placed_BxLxD, None

        points = self.decoder_layers(c, self.model.text)
        features_BxPxD = base.project(last_BxMNxV, batch, projector)
        return base.Fused(features_BxPxD, Injection(points, inject, bank_KxBxPxD))
