"""Qwen2 and LLaMA decoders: pre-norm blocks with rotary attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.config import ComputeConfig, TextConfig
from cli_jax.model import stack
from cli_jax.model.attention import attention, plain_attention
from cli_jax.model.layers import (
    Dtype,
    LogicalAxes,
    RMSNorm,
    dense,
    partitioned,
    rotary_angles,
    rotate,
)
from cli_jax.model.remat import layer_input


class Cache(NamedTuple):
    """Keys and values of all layers: [layers, B, S, kv_heads, head_dim] each."""

    key: jax.Array
    value: jax.Array


class Injection(NamedTuple):
    """What a fusion strategy adds inside the decoder: `inject` runs before each layer in `points`.

    inject(hidden [B, L, D], point) -> (hidden, out); `xs` holds one `point` per injection on its
    leading axis, so that a layer sees its own parameters and features and nobody else's.
    """

    points: tuple[int, ...]
    inject: Callable[[jax.Array, Any], tuple[jax.Array, Any]]
    xs: Any


# attend(q, k, v, cache, layer) -> (attention output, cache): training, prefill, decode and watching
# differ only in this function, and in what `cache` is.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], tuple]
# see(q [B, L, H, d], k [B, L, G, d]) -> arrays: of a layer's queries and keys, with their positions
See = Callable[[jax.Array, jax.Array], Any]


class Attention(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x, rotary, attend: Attend, cache, layer):
        c = self.config
        B, L, D = x.shape
        dtypes = (self.dtype, self.param_dtype)

        def heads(name: str, count: int, axis: str) -> jax.Array:
            width = count * c.head_dim
            y = dense(width, ("embed", axis), *dtypes, use_bias=c.attention_bias, name=name)(x)
            return y.reshape(B, L, count, c.head_dim)

        q = rotate(heads("q_proj", c.num_attention_heads, "heads"), rotary)
        k = rotate(heads("k_proj", c.num_key_value_heads, "kv_heads"), rotary)
        v = heads("v_proj", c.num_key_value_heads, "kv_heads")
        out, cache = attend(q, k, v, cache, layer)
        out = out.reshape(B, L, c.num_attention_heads * c.head_dim)
        return dense(D, ("heads", "embed"), *dtypes, use_bias=False, name="o_proj")(out), cache


class MLP(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:

        def linear(features: int, axes: LogicalAxes, name: str) -> nn.Dense:
            return dense(features, axes, self.dtype, self.param_dtype, use_bias=False, name=name)

        width = self.config.intermediate_size
        gate = linear(width, ("embed", "mlp"), "gate_proj")(x)
        up = linear(width, ("embed", "mlp"), "up_proj")(x)
        return linear(x.shape[-1], ("mlp", "embed"), "down_proj")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """h += attention(norm h); h += MLP(norm h) (transformers qwen2/modeling_qwen2.py)."""

    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, h_BxLxD, rotary, attend: Attend, cache, layer):
        args = (self.config, self.dtype, self.param_dtype)
        norm = (self.config.rms_norm_eps, self.dtype, self.param_dtype)
        out, cache = Attention(*args, name="self_attn")(
            RMSNorm(*norm, name="input_layernorm")(h_BxLxD), rotary, attend, cache, layer
        )
        h_BxLxD = h_BxLxD + out
        out = MLP(*args, name="mlp")(RMSNorm(*norm, name="post_attention_layernorm")(h_BxLxD))
        return nn.with_logical_constraint(h_BxLxD + out, ("batch", "length", None)), cache


class Decoder(nn.Module):
    """The language model without its head."""

    config: TextConfig
    compute: ComputeConfig
    dtype: Dtype
    param_dtype: Dtype

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=partitioned(
                nn.initializers.normal(c.initializer_range), ("vocab", "embed")
            ),
        )
        self.block = DecoderLayer(c, self.dtype, self.param_dtype, parent=None)
        one = jnp.zeros((1, 1), jnp.int32)
        self.layers = stack.stacked_params(
            self,
            "layers",
            self.block,
            c.num_hidden_layers,
            jnp.zeros((1, 1, c.hidden_size), self.dtype),
            rotary_angles(one, c.head_dim, c.rope_theta, self.dtype),
            lambda q, k, v, cache, layer: (q, cache),
            None,
            one[0, 0],
        )
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] -> embeddings [..., D]."""
        return self.embed_tokens(ids)

    def attend_head(self, hidden: jax.Array) -> jax.Array:
        """The tied head: hidden [..., D] -> logits [..., vocab]."""
        return self.embed_tokens.attend(hidden)

    def __call__(
        self,
        h_BxLxD: jax.Array,
        positions_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        *,
        injection: Injection | None = None,
        cache_length: int | None = None,
    ) -> tuple[jax.Array, Any, Cache | None]:
        """Embeddings -> (hidden states after the final norm, outputs of the injections, cache).

        With `cache_length` (>= L) the keys and values are kept, in slots 0..L-1.
        """

        def attend(q, k, v, cache, layer):
            return self._attend(q, k, v, segment_ids_BxL), _write(cache, k, v, layer, 0)

        cache = None
        if cache_length is not None:
            cache = self._empty_cache(h_BxLxD.shape[0], cache_length)
        return self._run(h_BxLxD, positions_BxL, attend, cache, injection)

    def watch(
        self,
        h_BxLxD: jax.Array,
        positions_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        *,
        see: See,
        injection: Injection | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """The same, but instead of a cache what `see` makes of every layer, stacked on axis 0."""
        c, (B, L) = self.config, positions_BxL.shape
        q, k = (
            jax.ShapeDtypeStruct((B, L, heads, c.head_dim), self.dtype)
            for heads in (c.num_attention_heads, c.num_key_value_heads)
        )

        def attend(q, k, v, seen, layer):
            seen = jax.tree.map(lambda x, one: x.at[layer].set(one), seen, see(q, k))
            return self._attend(q, k, v, segment_ids_BxL), seen

        seen = jax.tree.map(
            lambda x: jnp.zeros((c.num_hidden_layers, *x.shape), x.dtype), jax.eval_shape(see, q, k)
        )
        return self._run(h_BxLxD, positions_BxL, attend, seen, injection)

    def decode(
        self,
        h_BxD: jax.Array,
        positions_B: jax.Array,
        slot: jax.Array,
        valid_BxS: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """One token per row: writes its key and value to `slot` and attends to `valid` slots."""

        def attend(q, k, v, cache, layer):
            cache = _write(cache, k, v, layer, slot)
            ones = jnp.ones_like(positions_B)[:, None]
            segments = (ones, valid_BxS.astype(ones.dtype))
            keys, values = cache.key[layer], cache.value[layer]
            return plain_attention(q, keys, values, segments=segments), cache

        h, _, cache = self._run(h_BxD[:, None], positions_B[:, None], attend, cache, None)
        return h[:, 0], cache

    def _attend(self, q, k, v, segment_ids_BxL) -> jax.Array:
        axes, kernel = ("heads", "kv_heads"), self.compute.attention
        return attention(q, k, v, segment_ids_BxL, causal=True, heads=axes, kernel=kernel)

    def _run(self, h, positions, attend, cache, injection):
        c = self.config
        rotary = rotary_angles(positions, c.head_dim, c.rope_theta, self.dtype)

        def body(carry, xs):
            h, cache = carry
            params, layer = xs
            h = layer_input(h)
            return self.block.apply({"params": params}, h, rotary, attend, cache, layer), None

        def visit(carry, point):
            h, cache = carry
            h, out = injection.inject(layer_input(h), point)
            return (h, cache), out

        (h, cache), outs = stack.run(
            body,
            (h, cache),
            (self.layers, jnp.arange(c.num_hidden_layers)),
            stop=c.num_hidden_layers,
            unroll=not self.compute.scan_layers,
            points=injection.points if injection else (),
            visit=visit,
            visits=injection.xs if injection else None,
            remat=self.compute.remat,
        )
        return self.norm(h), outs, cache

    def _empty_cache(self, rows: int, length: int) -> Cache:
        c = self.config
        shape = (c.num_hidden_layers, rows, length, c.num_key_value_heads, c.head_dim)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))


def _write(cache: Cache | None, k, v, layer, slot) -> Cache | None:
    if cache is None:
        return None
    at = (layer, 0, slot, 0, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key, k[None], at),
        jax.lax.dynamic_update_slice(cache.value, v[None], at),
    )
