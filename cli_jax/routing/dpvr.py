"""`dpvr`: DPVR-LF, dual-path vision token routing, late-layer fusion (docs/method.md section 3).

    layers 0..s-1   all tokens
    side branch     one layer of its own, on the vision tokens (newlines included)
    layers s..n-2   text tokens only, gathered into a dense row
    layer n-1       text attends to text and to what the side branch made of vision

Vision and text are gathered into dense rows of P and Q slots, so what a path skips is not computed:
a mask alone would save nothing. Source: arXiv 2606.09131.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cli_jax.config import ConfigError, ModelConfig
from cli_jax.fusion import registry
from cli_jax.fusion.base import Copy, Row
from cli_jax.model.attention import plain_attention
from cli_jax.model.decoder import (
    Cache,
    Decoder,
    DecoderLayer,
    Injection,
    attend_cache,
    attend_row,
    layer_example,
    write_cache,
)
from cli_jax.model.gather import place, take_or_zero
from cli_jax.model.layers import rotary_angles
from cli_jax.model.remat import attention_output, layer_input, rematerialize
from cli_jax.routing import base

SIDE = "routing/side_branch/"  # paths of the side branch's parameters
LAYERS = "language_model/layers/"


class Slots(NamedTuple):
    """A dense row [B, R]: each slot's place in its row (L = none), segment (0) and position."""

    place: jax.Array
    segment: jax.Array
    position: jax.Array


class Caches(NamedTuple):
    """Keys and values of the three groups of layers; N slots are for generated tokens.

    shallow  [s, B, L+N, ...]      all tokens
    deep     [n-1-s, B, Q+N, ...]  text
    last     [1, B, P+Q+N, ...]    vision as the side branch left it, then text
    visual   bool [B, P], text bool [B, Q]: slots of the prompt that hold a token
    """

    shallow: Cache
    deep: Cache
    last: Cache
    visual: jax.Array
    text: jax.Array


class DPVR(base.Routing):
    """Hidden states are those of text; a vision token predicts nothing.

    Every parameter of the side branch has a gradient from the first step on.
    """

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        s, n = model.routing.saturation, model.text.num_hidden_layers
        if not 0 < s < n:
            raise ConfigError(
                f"config.routing.saturation={s}: the decoder has {n} layers, give 1 to {n - 1}"
            )
        points = registry.of(model).decoder_layers(model.fusion, model.text)
        if late := [t for t in points if t >= s]:
            raise ConfigError(
                f"config.fusion.{model.fusion_name} injects at decoder layers {late}, which vision "
                f"tokens do not pass with config.routing.saturation={s}: inject before layer {s} "
                f"only, or raise the saturation layer"
            )

    @classmethod
    def copies(cls, model: ModelConfig, paths: Iterable[str]) -> dict[str, Copy]:
        """The side branch starts as layer s."""
        return {
            path: Copy(LAYERS + path.removeprefix(SIDE), model.routing.saturation)
            for path in paths
            if path.startswith(SIDE)
        }

    @classmethod
    def flops(cls, model: ModelConfig, row: Row) -> dict[str, float]:
        """`decoder` is layers 0..n-2; `side` the side branch; `late` layer n-1."""
        s, n = model.routing.saturation, model.text.num_hidden_layers
        P, Q = row.visual, row.text
        weights, of_keys = base.layer_weights(model)
        return {
            "decoder": base.decoder_flops(model, s, row.length)
            + base.decoder_flops(model, n - 1 - s, Q),
            "side": base.decoder_flops(model, 1, P),
            "late": 2.0 * Q * weights
            + 2.0 * P * of_keys
            + base.attention_flops(model, Q * (P + Q) / 2),
            "head": base.head_flops(model, Q),
        }

    def setup(self) -> None:
        c = self.model.text
        self.block = DecoderLayer(c, self.dtype, self.param_dtype, parent=None)
        example = layer_example(c, self.dtype)
        self.side_branch = self.param(
            "side_branch", lambda key: self.block.init(key, *example)["params"]
        )

    def __call__(
        self,
        decoder: Decoder,
        h_BxLxD: jax.Array,
        batch: base.Batch,
        injection: Injection | None,
        cache_length: int | None,
    ) -> base.Routed:
        s, last = self.model.routing.saturation, self.model.text.num_hidden_layers - 1
        seen, read = _slots(batch, "visual_position"), _slots(batch, "text_position")
        caches = self._empty_caches(decoder, seen, read, h_BxLxD.shape[1], cache_length)
        kernel = self.compute.attention

        whole = attend_row(batch["segment_ids"], kernel)
        h_BxLxD, outs, shallow = decoder.run(
            h_BxLxD,
            batch["positions"],
            whole,
            caches and caches.shallow,
            stop=s,
            injection=injection,
        )
        vision_BxPxD = place(h_BxLxD, batch["visual_position"], batch["visual_index"])
        vision_BxPxD = self._side(vision_BxPxD, seen)
        text_BxQxD = place(h_BxLxD, batch["text_position"], batch["text_index"])
        dense = attend_row(read.segment, kernel)
        text_BxQxD, _, deep = decoder.run(
            text_BxQxD, read.position, dense, caches and caches.deep, start=s, stop=last
        )
        both = _attend_both(decoder.keys_values(vision_BxPxD, seen.position, last), seen, read)
        text_BxQxD, _, late = decoder.run(
            text_BxQxD, read.position, both, caches and caches.last, start=last
        )

        text_BxQxD = decoder.norm(text_BxQxD)
        return base.Routed(
            hidden=place(text_BxQxD, batch["text_index"], batch["text_position"]),
            outs=outs,
            cache=caches and caches._replace(shallow=shallow, deep=deep, last=late),
            scored=base.Scored(text_BxQxD, batch["text_position"]),
        )

    def decode(
        self,
        decoder: Decoder,
        h_BxD: jax.Array,
        positions_B: jax.Array,
        slot: jax.Array,
        valid_BxS: jax.Array,
        cache: Caches,
    ) -> tuple[jax.Array, Caches]:
        """A generated token is text: it passes all layers, and the side branch never runs."""
        s, last = self.model.routing.saturation, self.model.text.num_hidden_layers - 1
        P, Q = cache.visual.shape[1], cache.text.shape[1]
        L = valid_BxS.shape[1] - (cache.deep.key.shape[2] - Q)
        new_BxN, step = valid_BxS[:, L:], slot - L
        text_BxS = jnp.concatenate([cache.text, new_BxN], axis=1)
        both_BxS = jnp.concatenate([cache.visual, text_BxS], axis=1)
        parts = (
            (0, s, attend_cache(slot, valid_BxS), cache.shallow),
            (s, last, attend_cache(Q + step, text_BxS), cache.deep),
            (last, last + 1, attend_cache(P + Q + step, both_BxS), cache.last),
        )
        h, filled = h_BxD[:, None], []
        for start, stop, attend, own in parts:
            h, _, own = decoder.run(h, positions_B[:, None], attend, own, start=start, stop=stop)
            filled.append(own)
        shallow, deep, late = filled
        cache = cache._replace(shallow=shallow, deep=deep, last=late)
        return decoder.norm(h)[:, 0], cache

    def _side(self, vision_BxPxD: jax.Array, seen: Slots) -> jax.Array:
        c = self.model.text
        rotary = rotary_angles(seen.position, c.head_dim, c.rope_theta, self.dtype)
        attend = attend_row(seen.segment, self.compute.attention)

        def branch(params: Any, h_BxPxD: jax.Array) -> jax.Array:
            h_BxPxD = layer_input(h_BxPxD)
            return self.block.apply({"params": params}, h_BxPxD, rotary, attend, None, 0)[0]

        return rematerialize(branch, self.compute.remat, looped=False)(
            self.side_branch, vision_BxPxD
        )

    def _empty_caches(
        self, decoder: Decoder, seen: Slots, read: Slots, length: int, cache_length: int | None
    ) -> Caches | None:
        if cache_length is None:
            return None
        s, n = self.model.routing.saturation, self.model.text.num_hidden_layers
        (B, P), Q, new = seen.place.shape, read.place.shape[1], cache_length - length
        return Caches(
            shallow=decoder.empty_cache(s, B, cache_length),
            deep=decoder.empty_cache(n - 1 - s, B, Q + new),
            last=decoder.empty_cache(1, B, P + Q + new),
            visual=seen.segment > 0,
            text=read.segment > 0,
        )


def _slots(batch: base.Batch, name: str) -> Slots:
    place_BxR = batch[name]
    if not place_BxR.shape[1]:
        of = {"visual_position": "visual_per_row", "text_position": "text_per_row"}[name]
        raise ValueError(f"{name} is empty: give the batch slots (config.data.{of})")

    def at(x_BxL: jax.Array) -> jax.Array:
        return take_or_zero(x_BxL[:, :, None], place_BxR)[:, :, 0]

    return Slots(place_BxR, at(batch["segment_ids"]), at(batch["positions"]))


def _attend_both(vision: tuple[jax.Array, jax.Array], seen: Slots, read: Slots) -> Any:
    """Text attends to text and to the keys and values of vision, at their places in the row.

    In plain XLA: one layer, whose scores [B, H, Q, P+Q] no kernel has the mask for.
    """
    keys, values = vision
    segments, places = (
        (of_text, jnp.concatenate([of_vision, of_text], axis=1))
        for of_vision, of_text in zip(
            (seen.segment, seen.place), (read.segment, read.place), strict=True
        )
    )

    def attend(q, k, v, cache, layer):
        k, v = jnp.concatenate([keys, k], axis=1), jnp.concatenate([values, v], axis=1)
        out = plain_attention(q, k, v, segments=segments, causal=True, places=places)
        return attention_output(out), write_cache(cache, k, v, layer, 0)

    return attend
