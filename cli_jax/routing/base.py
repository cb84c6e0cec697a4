"""The interface of a routing, and the plain one, `none`: all tokens pass all decoder layers.

A routing is given the decoder and decides which tokens run through which of its layers; the decoder
knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from cli_jax.config import ComputeConfig, ModelConfig
from cli_jax.fusion.base import Copy, Row
from cli_jax.model.decoder import Decoder, Injection
from cli_jax.model.layers import Dtype

Batch = dict[str, jax.Array]


class Scored(NamedTuple):
    """The hidden states that predict a token, densely: [B, R, D], and their row positions [B, R].

    One past the row's end = nothing. What stands nowhere else predicts nothing.
    """

    hidden: jax.Array
    position: jax.Array


class Routed(NamedTuple):
    """What the decoder made of a row.

    hidden  [B, L, D]  after the final norm, zero where nothing was computed
    outs               outputs of the injections
    cache              of prefill, in a form that only `decode` reads; else None
    scored             see Scored; None = everything is
    """

    hidden: jax.Array
    outs: Any
    cache: Any
    scored: Scored | None = None


class Routing(nn.Module):
    """`none`, and the base class of the others."""

    model: ModelConfig
    compute: ComputeConfig
    dtype: Dtype
    param_dtype: Dtype

    @classmethod
    def check(cls, model: ModelConfig) -> None:
        """Raises ConfigError for a model that cannot be routed so."""

    @classmethod
    def copies(cls, model: ModelConfig, paths: Iterable[str]) -> dict[str, Copy]:
        """Those of the model's `paths` that start as copies."""
        return {}

    @classmethod
    def flops(cls, model: ModelConfig, row: Row) -> dict[str, float]:
        """Forward FLOPs of one row by part: `decoder`, `head` (dryrun/flops.py)."""
        return {
            "decoder": decoder_flops(model, model.text.num_hidden_layers, row.length),
            "head": head_flops(model, row.length),
        }

    def __call__(
        self,
        decoder: Decoder,
        h_BxLxD: jax.Array,
        batch: Batch,
        injection: Injection | None,
        cache_length: int | None,
    ) -> Routed:
        """Embeddings -> hidden states; with `cache_length` a cache is kept for `decode`."""
        return Routed(
            *decoder(
                h_BxLxD,
                batch["positions"],
                batch["segment_ids"],
                injection=injection,
                cache_length=cache_length,
            )
        )

    def decode(
        self,
        decoder: Decoder,
        h_BxD: jax.Array,
        positions_B: jax.Array,
        slot: jax.Array,
        valid_BxS: jax.Array,
        cache: Any,
    ) -> tuple[jax.Array, Any]:
        """One token per row, as `Decoder.decode`."""
        return decoder.decode(h_BxD, positions_B, slot, valid_BxS, cache)


def layer_weights(model: ModelConfig) -> tuple[int, int]:
    """Weights of one decoder layer: all of them, and those that make its keys and values."""
    c = model.text
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    return weights, 2 * c.hidden_size * keys


def attention_flops(model: ModelConfig, pairs: float) -> float:
    """Scores and sums of so many pairs of a query and a key in one layer."""
    return 4.0 * pairs * model.text.num_attention_heads * model.text.head_dim


def decoder_flops(model: ModelConfig, layers: int, tokens: int) -> float:
    """Layers over a row of tokens; half of all pairs of positions attend to each other."""
    weights, _ = layer_weights(model)
    return layers * (2.0 * tokens * weights + attention_flops(model, tokens**2 / 2))


def head_flops(model: ModelConfig, tokens: int) -> float:
    """Logits of so many positions."""
    return 2.0 * tokens * model.text.hidden_size * model.text.vocab_size
