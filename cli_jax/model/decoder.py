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
        self.layers = stack.stacked_params(
            self, "layers", self.block, c.num_hidden_layers, *layer_example(c, self.dtype)
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
        cache = None
        if cache_length is not None:
            layers = self.config.num_hidden_layers
            cache = self.empty_cache(layers, h_BxLxD.shape[0], cache_length)
        attend = attend_row(segment_ids_BxL, self.compute.attention)
        h, outs, cache = self.run(h_BxLxD, positions_BxL, attend, cache, injection=injection)
        return self.norm(h), outs, cache

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

        inner = attend_row(segment_ids_BxL, self.compute.attention)

        def attend(q, k, v, seen, layer):
            seen = jax.tree.map(lambda x, one: x.at[layer].set(one), seen, see(q, k))
            return inner(q, k, v, None, layer)[0], seen

        seen = jax.tree.map(
            lambda x: jnp.zeros((c.num_hidden_layers, *x.shape), x.dtype), jax.eval_shape(see, q, k)
        )
        h, outs, seen = self.run(h_BxLxD, positions_BxL, attend, seen, injection=injection)
        return self.norm(h), outs, seen

    def decode(
        self,
        h_BxD: jax.Array,
        positions_B: jax.Array,
        slot: jax.Array,
        valid_BxS: jax.Array,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """One token per row: writes its key and value to `slot` and attends to `valid` slots."""
        attend = attend_cache(slot, valid_BxS)
        h, _, cache = self.run(h_BxD[:, None], positions_B[:, None], attend, cache)
        return self.norm(h)[:, 0], cache

    def run(
        self,
        h_BxLxD: jax.Array,
        positions_BxL: jax.Array,
        attend: Attend,
        cache: Any,
        *,
        start: int = 0,
        stop: int | None = None,
        injection: Injection | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """Layers [start, stop), all by default -> (h, outputs of the injections, cache); no norm.

        `cache` is that of these layers, or None; `attend` is given a layer's place in it.
        """
        c = self.config
        count = (c.num_hidden_layers if stop is None else stop) - start
        rotary = rotary_angles(positions_BxL, c.head_dim, c.rope_theta, self.dtype)
        # A scan over some of the layers would copy their weights: they are looked up instead.
        layers = self.layers if count == c.num_hidden_layers else None
        points, inject, xs = injection or Injection((), lambda h, _: (h, None), None)

        def body(carry, xs):
            h, cache = carry
            params, layer = xs
            if params is None:
                params = jax.tree.map(lambda x: _at(x, start + layer), self.layers)
            h = layer_input(h)
            return self.block.apply({"params": params}, h, rotary, attend, cache, layer), None

        def visit(carry, point):
            h, cache = carry
            h, out = inject(layer_input(h), point)
            return (h, cache), out

        (h, cache), outs = stack.run(
            body,
            (h_BxLxD, cache),
            (layers, jnp.arange(count)),
            stop=count,
            unroll=not self.compute.scan_layers,
            points=points,
            visit=visit,
            visits=xs,
            remat=self.compute.remat,
        )
        return h, outs, cache

    def keys_values(
        self, h_BxLxD: jax.Array, positions_BxL: jax.Array, layer: int
    ) -> tuple[jax.Array, jax.Array]:
        """What a layer lets others see of h: keys and values [B, L, kv_heads, head_dim].

        The layer is applied as a whole; all that follows its keys and values is dead code, which
        the compiler drops.
        """
        c = self.config
        rotary = rotary_angles(positions_BxL, c.head_dim, c.rope_theta, self.dtype)
        params = jax.tree.map(lambda x: x[layer], self.layers)
        out: Any = self.block.apply(
            {"params": params}, h_BxLxD, rotary, lambda q, k, v, *_: (q, (k, v)), None, layer
        )
        return out[1]

    def empty_cache(self, layers: int, rows: int, length: int) -> Cache:
        """A cache of so many layers, for `length` tokens of every row."""
        c = self.config
        shape = (layers, rows, length, c.num_key_value_heads, c.head_dim)
        return Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def layer_example(c: TextConfig, dtype: Dtype) -> tuple[Any, ...]:
    """Arguments of a DecoderLayer, to initialize its parameters with."""
    one = jnp.zeros((1, 1), jnp.int32)
    return (
        jnp.zeros((1, 1, c.hidden_size), dtype),
        rotary_angles(one, c.head_dim, c.rope_theta, dtype),
        lambda q, k, v, cache, layer: (q, cache),
        None,
        one[0, 0],
    )


def attend_row(segment_ids_BxL: jax.Array, kernel: str) -> Attend:
    """Causal attention within the samples of rows; fills the first L slots of a cache."""

    def attend(q, k, v, cache, layer):
        out = attention(
            q, k, v, segment_ids_BxL, causal=True, heads=("heads", "kv_heads"), kernel=kernel
        )
        return out, write_cache(cache, k, v, layer, 0)

    return attend


def attend_cache(slot: jax.Array, valid_BxS: jax.Array) -> Attend:
    """One token per row: its key and value go to `slot`, it attends to the `valid` slots."""

    def attend(q, k, v, cache, layer):
        cache = write_cache(cache, k, v, layer, slot)
        ones = jnp.ones((q.shape[0], 1), jnp.int32)
        segments = (ones, valid_BxS.astype(ones.dtype))
        keys, values = cache.key[layer], cache.value[layer]
        return plain_attention(q, keys, values, segments=segments), cache

    return attend


def write_cache(cache: Cache | None, k, v, layer, slot) -> Cache | None:
    """The cache with keys and values [B, l, ...] of a layer from a slot on."""
    if cache is None:
        return None
    at = (layer, 0, slot, 0, 0)
    return Cache(
        jax.lax.dynamic_update_slice(cache.key, k[None], at),
        jax.lax.dynamic_update_slice(cache.value, v[None], at),
    )
