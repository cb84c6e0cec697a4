"""Attention behind one function."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BxLxHxd: jax.Array,
    k_BxSxGxd: jax.Array,
    v_BxSxGxd: jax.Array,
    *,
    segments: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention [B, L, H, d] with grouped key-value heads (H a multiple of G).

    A query attends to a key when their segment ids (`segments` = ids of queries [B, L] and of keys
    [B, S]) are equal and, if `causal`, the key's place in the row is not after the query's.
    Scores are scaled after the product and the softmax is in float32, as transformers' eager
    attention does.
    """
    B, L, H, d = q_BxLxHxd.shape
    S, G = k_BxSxGxd.shape[1:3]
    q = q_BxLxHxd.reshape(B, L, G, H // G, d)
    scores = jnp.einsum("BLGRd,BSGd->BGRLS", q, k_BxSxGxd, preferred_element_type=jnp.float32)
    scores = scores * d**-0.5
    mask = None
    if segments is not None:
        of_query, of_key = segments
        mask = of_query[:, None, None, :, None] == of_key[:, None, None, None, :]
    if causal:
        past = jnp.tril(jnp.ones((L, S), bool))[None, None, None]
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxGxd.dtype)
    return jnp.einsum("BGRLS,BSGd->BLGRd", weights, v_BxSxGxd).reshape(B, L, H, d)
