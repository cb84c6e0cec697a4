"""`dense_connector`: shallower vision layers join the last one at the decoder's input.

    sti    X = V_last, and behind the picture's tokens the pooled tokens of two shallower layers
    sci    X = [V_last ; V_a ; V_b]                                          along channels
    dci    X = [V_last ; mean of the first half of layers ; mean of the second]   along channels

X goes through the projector, which reads 3 V channels for sci and dci (DenseConnector,
`dense_connector.py` and `llava_arch.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cli_jax.config import ModelConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.model.projector import Projector

POOL = 8  # consecutive patches of a pooled token; what is left over of a tile is dropped


@dataclasses.dataclass(frozen=True)
class DenseConnectorConfig:
    """variant: as above.

    taps: the shallower layers of sti and sci; empty: the ends of the first two thirds of the tower,
    7 and 15 of both CLIP's 24 layers and SigLIP's 26.
    """

    variant: Literal["sti", "sci", "dci"] = "dci"
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.variant == "dci" and self.taps:
            raise ValueError(
                f"fusion.dense_connector.taps={self.taps}: dci takes the means of all layers, so "
                "leave taps empty, or choose sti or sci"
            )


class DenseConnector(base.Fusion):
    """Input-side only; the pooled tokens of sti stand behind the picture's last newline."""

    Config = DenseConnectorConfig

    @classmethod
    def taps(cls, config: DenseConnectorConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        """The layers, or means of layers, that join V_last."""
        n, last = vision.num_hidden_layers, vision.last_layer
        if config.variant == "dci":
            if n < 2:
                raise ValueError(
                    f"fusion.dense_connector.variant=dci needs 2 vision layers or more, not {n}"
                )
            return tuple(range(n // 2)), tuple(range(n // 2, n))
        if not config.taps and n < 3:
            raise ValueError(f"{n} vision layers have no thirds: set fusion.dense_connector.taps")
        taps = base.taps(config.taps or (n // 3 - 1, 2 * (n // 3) - 1), vision)
        if taps[-1][0] > last:
            raise ValueError(
                f"fusion.dense_connector.taps {config.taps} reach behind the last layer, {last}"
            )
        return taps

    @classmethod
    def vision_layers(cls, config: DenseConnectorConfig, vision: VisionConfig) -> tuple[int, ...]:
        return base.layers_of((*cls.taps(config, vision), (vision.last_layer,)))

    @classmethod
    def extras(cls, config: DenseConnectorConfig, model: ModelConfig) -> Extras:
        if config.variant != "sti":
            return NO_EXTRAS
        pooled = model.vision.num_patches // POOL
        if not pooled:
            raise ValueError(
                f"fusion.dense_connector.variant=sti pools {POOL} patches into a token, a tile has "
                f"{model.vision.num_patches}: use sci or dci"
            )
        return Extras(pooled=len(cls.taps(config, model.vision)) * pooled)

    @classmethod
    def has_plain_projector(cls, config: DenseConnectorConfig) -> bool:
        return config.variant == "sti"

    @classmethod
    def flops(
        cls, config: DenseConnectorConfig, model: ModelConfig, row: base.Row
    ) -> dict[str, float]:
        pooled = cls.extras(config, model).pooled
        joined = 0 if pooled else len(cls.taps(config, model.vision))
        width = (1 + joined) * model.vision.hidden_size
        return {"projector": base.project_flops(model, row, width=width, pooled=pooled)}

    def __call__(
        self, look: base.Look, batch: dict[str, jax.Array], projector: Projector
    ) -> base.Fused:
        c: DenseConnectorConfig = self.model.fusion
        taps, last = self.taps(c, self.model.vision), self.model.vision.last_layer
        tiles = batch["pixel_values"].shape[1]
        if c.variant == "dci":
            layers, shares = _shares(taps)
            means_BxMNxKV, last_BxMNxV = look(layers, last, _shared, shares, True)
            X = jnp.concatenate([last_BxMNxV, means_BxMNxKV.astype(last_BxMNxV.dtype)], -1)
        elif c.variant == "sci":
            taps_KxBxMNxV, last_BxMNxV = look(base.layers_of(taps), last, base.raw, None)
            X = jnp.concatenate([last_BxMNxV, *taps_KxBxMNxV], -1)
        else:
            pool = _pool(tiles)
            taps_KxBxMxQxV, last_BxMNxV = look(base.layers_of(taps), last, pool, None)
            B, _, V = last_BxMNxV.shape
            last_BxMxNxV = last_BxMNxV.reshape(B, tiles, -1, V)
            X = jnp.concatenate([last_BxMxNxV, *taps_KxBxMxQxV], 2).reshape(B, -1, V)
        return base.Fused(base.project(X, batch, projector), None)


def _shares(taps: tuple[base.Tap, ...]) -> tuple[tuple[int, ...], jax.Array]:
    """The layers of means, and each one's share of each mean [layers, K] float32."""
    layers = base.layers_of(taps)
    shares = [[(layer in tap) / len(tap) for tap in taps] for layer in layers]
    return layers, jnp.asarray(shares, jnp.float32)


def _shared(V_BxMNxV: jax.Array, share_K: jax.Array) -> jax.Array:
    """What a layer adds to the K means, side by side: [B, M*N, K*V] float32."""
    B, patches, _ = V_BxMNxV.shape
    parts_BxMNxKxV = V_BxMNxV[:, :, None].astype(jnp.float32) * share_K[:, None]
    return parts_BxMNxKxV.reshape(B, patches, -1)


def _pool(tiles: int) -> Any:
    """Emits the means of `POOL` consecutive patches of each tile [B, M, N//POOL, V]."""

    def pool(V_BxMNxV: jax.Array, _: Any) -> jax.Array:
        B, patches, V = V_BxMNxV.shape
        pooled = patches // tiles // POOL
        V_BxMxNxV = V_BxMNxV.reshape(B, tiles, -1, V)
        whole = V_BxMxNxV[:, :, : pooled * POOL].reshape(B, tiles, pooled, POOL, V)
        return jnp.mean(whole, axis=3)

    return pool
