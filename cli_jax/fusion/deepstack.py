"""`deepstack`: high-resolution patches are added to the picture's tokens, a stack per layer.

    h[pos] += S_k[pos]    before decoder layer start + k * interval, k = 0..m-1

S_k holds every s-th row and column of the picture's high-resolution patches, projected as at the
input, as many as the base view has tokens; `pos` are those tokens. No parameters and no gates
(DeepStack-VL, `custom_llama.py`). Which patches a stack reads is host code's: `image/stacks.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.image.anyres import treatment
from cli_jax.image.extras import Extras
from cli_jax.image.stacks import square_side
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import apply_plan, place
from cli_jax.model.projector import Projector

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DeepStackConfig:
    """stacks: m; under any-resolution a square, else the most tiles that a picture gets for them.

    start, interval: before decoder layers start, start + interval, ... one stack each is added.
    """

    stacks: int = 4
    start: int = 1
    interval: int = 1

    def __post_init__(self) -> None:
        for name, least in (("stacks", 1), ("start", 0), ("interval", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"fusion.deepstack.{name} is {value}: it must be >= {least}")


class DeepStack(base.Fusion):
    """The decoder's input sequence stays that of `none`."""

    Config = DeepStackConfig

    @classmethod
    def vision_layers(cls, config: DeepStackConfig, vision: VisionConfig) -> tuple[int, ...]:
        return (vision.last_layer,)

    @classmethod
    def decoder_layers(cls, config: DeepStackConfig, text: TextConfig) -> tuple[int, ...]:
        points = range(
            config.start, config.start + config.stacks * config.interval, config.interval
        )
        if points[-1] >= text.num_hidden_layers:
            raise ValueError(
                f"fusion.deepstack.stacks={config.stacks} are added before the decoder layers "
                f"{list(points)}: this model has 0..{text.num_hidden_layers - 1}, so lower stacks, "
                "start or interval"
            )
        return tuple(points)

    @classmethod
    def extras(cls, config: DeepStackConfig, model: ModelConfig) -> Extras:
        if treatment(model.image, single=True).kind == "anyres":
            square_side(config.stacks)
            return Extras(stacks=config.stacks)  # of tiles that are there already
        if config.stacks < 2:
            raise ValueError(
                f"fusion.deepstack.stacks={config.stacks}: with model.image.aspect_ratio="
                f"{model.image.aspect_ratio} it is how many more tiles a picture may get, 2 or more"
            )
        return Extras(stacks=config.stacks, tiles=config.stacks)

    @classmethod
    def bank_reads(cls, config: DeepStackConfig, model: ModelConfig, row: base.Row) -> float:
        return float(_slots(config, model, row) * model.text.hidden_size)

    @classmethod
    def flops(cls, config: DeepStackConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        D, W, slots = model.text.hidden_size, model.projector_hidden, _slots(config, model, row)
        stacks = 2.0 * W * D * slots + base.plan_flops(W, slots)
        return {"projector": base.project_flops(model, row) + stacks}

    def __call__(self, look: base.Look, batch: Batch, projector: Projector) -> base.Fused:
        _, last_BxMNxV = look((), self.model.vision.last_layer, base.raw, None)
        hidden_BxMNxD = projector.hidden(last_BxMNxV)
        features_BxPxD = base.project_hidden(hidden_BxMNxD, batch, projector)
        bank_mxBxINxD = self._stacks(hidden_BxMNxD, batch, projector)
        index_BxL, position_BxIN = _base_tokens(batch, self.model.vision.num_patches)

        def inject(h_BxLxD: jax.Array, stack_BxINxD: jax.Array) -> tuple[jax.Array, None]:
            return h_BxLxD + place(stack_BxINxD, index_BxL, position_BxIN), None

        points = self.decoder_layers(self.model.fusion, self.model.text)
        return base.Fused(features_BxPxD, Injection(points, inject, bank_mxBxINxD))

    def _stacks(self, hidden_BxMNxD: jax.Array, batch: Batch, projector: Projector) -> jax.Array:
        """The stacks [m, B, I*N, D]: P on the patches they read, zero where they read none."""
        B, m, I, N, reads = batch["stack_index"].shape
        if m != self.model.fusion.stacks:
            raise ValueError(
                f"the batch has {m} stacks, fusion.deepstack.stacks is {self.model.fusion.stacks}: "
                "make the batch with the strategy's extras (Experiment.extras)"
            )
        index_BxSx4, weight_BxSx4 = (
            batch[name].reshape(B, m * I * N, reads) for name in ("stack_index", "stack_weight")
        )
        gathered_BxSxD = apply_plan(
            hidden_BxMNxD, index_BxSx4, weight_BxSx4, batch["stack_inverse"]
        )
        used_BxS = jnp.any(weight_BxSx4 > 0, axis=-1)
        stacks_BxSxD = projector.output(gathered_BxSxD) * used_BxS[..., None]
        return jnp.moveaxis(stacks_BxSxD.reshape(B, m, I * N, -1), 1, 0)


def _slots(config: DeepStackConfig, model: ModelConfig, row: base.Row) -> int:
    """m*I*N, the features that all injections of a row add."""
    return config.stacks * row.images * model.vision.num_patches


def _base_tokens(batch: Batch, patches: int) -> tuple[jax.Array, jax.Array]:
    """Where the first N tokens of each image stand, both ways: int32 [B, L] and [B, I*N].

    At each row position i*N + n, or I*N for none; of each i*N + n the row position, or L.
    """
    B, L = batch["input_ids"].shape
    images = batch["image_segment"].shape[1]
    own_BxIxP = batch["visual_image"][:, None] == jnp.arange(images)[:, None]
    position_BxIxP = jnp.where(own_BxIxP, batch["visual_position"][:, None], L)
    start_BxI = jnp.min(position_BxIxP, axis=-1, initial=L)
    patch_BxIxL = jnp.arange(L) - start_BxI[..., None]
    slot_BxIxL = jnp.arange(images)[:, None] * patches + patch_BxIxL
    inside_BxIxL = (patch_BxIxL >= 0) & (patch_BxIxL < patches)
    index_BxL = jnp.min(jnp.where(inside_BxIxL, slot_BxIxL, images * patches), axis=1)
    position_BxIxN = start_BxI[..., None] + jnp.arange(patches)
    position_BxIxN = jnp.where(start_BxI[..., None] < L, position_BxIxN, L)
    return index_BxL, position_BxIxN.reshape(B, images * patches)
