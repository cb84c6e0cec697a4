"""The vision-language model: tiles and token ids -> visual features -> hidden states -> logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax import routing
from cli_jax.config import ComputeConfig, ModelConfig
from cli_jax.fusion import registry
from cli_jax.model.attention import kernel_for
from cli_jax.model.decoder import Decoder, Injection, See
from cli_jax.model.gather import place
from cli_jax.model.layers import partitioned
from cli_jax.model.projector import Projector
from cli_jax.model.vision import Emit, VisionTower, normalize
from cli_jax.routing.base import Scored

Batch = dict[str, jax.Array]


class Output(NamedTuple):
    """hidden [B, L, D] after the final norm; gates [T, B, I, K(, D)] float32, or None.

    scored: where a token can be predicted, if that is not everywhere (`routing/base.py`).
    """

    hidden: jax.Array
    gates: jax.Array | None
    scored: Scored | None = None


class VLM(nn.Module):
    """LLaVA with an exchangeable fusion strategy; parameter names follow Hugging Face's."""

    config: ModelConfig
    compute: ComputeConfig

    def setup(self) -> None:
        c, compute = self.config, self.compute
        dtype, param_dtype = jnp.dtype(compute.dtype), jnp.dtype(compute.param_dtype)
        strategy = registry.of(c)
        self.vision_tower = VisionTower(c.vision, compute, dtype, param_dtype)
        self.multi_modal_projector = Projector(
            c.text.hidden_size, dtype, param_dtype, c.projector_width
        )
        self.fusion = strategy(c, not compute.scan_layers, compute.remat, dtype, param_dtype)
        self.language_model = Decoder(c.text, compute, dtype, param_dtype)
        self.routing = routing.of(c)(c, compute, dtype, param_dtype)
        if c.has_newline:
            self.image_newline = self.param(
                "image_newline",
                partitioned(nn.initializers.normal(c.text.hidden_size**-0.5), ("norm",)),
                (c.text.hidden_size,),
                param_dtype,
            )
        if not c.text.tie_word_embeddings:
            self.lm_head = nn.Dense(
                c.text.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=partitioned(
                    nn.initializers.normal(c.text.initializer_range), ("embed", "vocab")
                ),
            )

    def __call__(self, batch: Batch) -> Output:
        """A batch (cli_jax/batch.py) -> hidden states and gates."""
        output, _ = self._forward(batch, None)
        if self.is_initializing():
            self.logits(output.hidden[:1, :1])
        return output

    def prefill(self, batch: Batch, cache_length: int) -> tuple[Output, Any]:
        """The same, keeping keys and values in slots 0..L-1 of a cache of `cache_length` slots."""
        return self._forward(batch, cache_length)

    def watch(self, batch: Batch, see: See) -> tuple[Output, Any]:
        """As a call without routing, and what `see` makes of every layer's queries and keys."""
        h_BxLxD, injection = self._embed(batch)
        hidden, outs, seen = self.language_model.watch(
            h_BxLxD, batch["positions"], batch["segment_ids"], see=see, injection=injection
        )
        return Output(hidden, outs), seen

    def decode(
        self,
        tokens_B: jax.Array,
        positions_B: jax.Array,
        slot: jax.Array,
        valid_BxS: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """One generated token per row -> (hidden [B, D], cache). No vision, no injection."""
        decoder = self.language_model
        h_BxD = decoder.embed(tokens_B)
        return self.routing.decode(decoder, h_BxD, positions_B, slot, valid_BxS, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., vocab]."""
        if self.config.text.tie_word_embeddings:
            return self.language_model.attend_head(hidden).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)

    def vision(self, pixel_values: jax.Array, layers: tuple[int, ...]) -> jax.Array:
        """Tiles uint8 [B, M, H, W, 3] -> hidden states of `layers` [K, B, M*N, V]."""
        return self.look(pixel_values, layers, layers[-1], lambda x, _: x, None)[0]

    def look(
        self,
        pixel_values: jax.Array,
        layers: tuple[int, ...],
        stop: int,
        emit: Emit,
        xs: Any,
        add: bool = False,
    ) -> tuple[Any, jax.Array]:
        """Tiles uint8 [B, M, H, W, 3] through the tower once (`fusion/base.py` Look)."""
        B, M = pixel_values.shape[:2]
        tiles = normalize(pixel_values.reshape(B * M, *pixel_values.shape[2:]), self.config.image)

        def by_row(x_TxNxV: jax.Array) -> jax.Array:
            return x_TxNxV.reshape(B, M * x_TxNxV.shape[1], x_TxNxV.shape[2])

        outs, last = self.vision_tower(
            tiles, layers, stop, lambda x, own: emit(by_row(x), own), xs, add
        )
        return outs, by_row(last)

    def _embed(self, batch: Batch) -> tuple[jax.Array, Injection | None]:
        """What enters the decoder [B, L, D], and what is injected into it."""
        look = functools.partial(self.look, batch["pixel_values"])
        fused = self.fusion(look, batch, self.multi_modal_projector)
        features_BxPxD = fused.features
        if self.config.has_newline:
            newline = batch["visual_newline"][..., None]
            features_BxPxD = jnp.where(
                newline, self.image_newline.astype(features_BxPxD.dtype), features_BxPxD
            )
        placed = place(features_BxPxD, batch["visual_index"], batch["visual_position"])
        is_visual = (batch["visual_index"] < features_BxPxD.shape[1])[..., None]
        h_BxLxD = jnp.where(is_visual, placed, self.language_model.embed(batch["input_ids"]))
        return nn.with_logical_constraint(h_BxLxD, ("batch", "length", None)), fused.injection

    def _forward(self, batch: Batch, cache_length: int | None) -> tuple[Output, Any]:
        h_BxLxD, injection = self._embed(batch)
        routed = self.routing(self.language_model, h_BxLxD, batch, injection, cache_length)
        return Output(routed.hidden, routed.outs, routed.scored), routed.cache


def build(config: ModelConfig, compute: ComputeConfig, platform: str | None = None) -> VLM:
    """The model of a config; checks the strategy's layers against the towers at once.

    `platform` is that of the devices it will run on (by default JAX's own), which decides what
    `attention="auto"` means.
    """
    strategy = registry.of(config)
    strategy.vision_layers(config.fusion, config.vision)
    strategy.decoder_layers(config.fusion, config.text)
    routing.of(config).check(config)
    strategy.extras(config.fusion, config)
    kernel: Any = kernel_for(compute.attention, platform or jax.default_backend(), compute.dtype)
    return VLM(config, dataclasses.replace(compute, attention=kernel))
