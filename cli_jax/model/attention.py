"""Attention behind one function: splash on TPU, cuDNN on GPU, XLA elsewhere.

`attention` is what models call. Which kernel it uses is a word in `ComputeConfig.attention`; `auto`
is settled by the platform before a model is built (`kernel_for`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cli_jax.model.kernels.cudnn import cudnn_attention
from cli_jax.model.remat import attention_output

SHORT = 128  # positions
HeadAxes = tuple[str, str]  # logical axes of the query heads and of the key-value heads


def kernel_for(name: str, platform: str, dtype: str) -> str:
    """The kernel that `name` (of ComputeConfig.attention) means on a platform of JAX's."""
    if name != "auto":
        return name
    if platform in ("gpu", "cuda"):
        return "xla" if dtype == "float32" else "cudnn"  # which takes 16 bits only
    return "splash" if platform == "tpu" else "xla"


def attention(
    q_BxLxHxd: jax.Array,
    k_BxLxGxd: jax.Array,
    v_BxLxGxd: jax.Array,
    segment_ids_BxL: jax.Array | None,
    *,
    causal: bool,
    heads: HeadAxes,
    kernel: str,
) -> jax.Array:
    """Softmax attention [B, L, H, d] within rows, grouped key-value heads (H a multiple of G).

    A position attends to those of its row with its own segment id (to all of them without ids),
    and, if `causal`, to none after it. Rows shorter than a kernel's block use the plain form.
    """
    if q_BxLxHxd.shape[1] < SHORT:
        kernel = "xla"
    if kernel == "splash":
        from cli_jax.model.kernels.splash import splash_attention  # Pallas takes a second to load

        out = splash_attention(
            q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, segment_ids_BxL, causal=causal, heads=heads
        )
    elif kernel == "cudnn":
        out = cudnn_attention(q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, segment_ids_BxL, causal=causal)
    else:
        segments = None if segment_ids_BxL is None else (segment_ids_BxL, segment_ids_BxL)
        out = plain_attention(q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, segments=segments, causal=causal)
    return attention_output(out)


def plain_attention(
    q_BxLxHxd: jax.Array,
    k_BxSxGxd: jax.Array,
    v_BxSxGxd: jax.Array,
    *,
    segments: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = False,
    places: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The same in plain XLA, for any queries and keys; what the kernels are measured against.

    A query attends to a key when their segment ids (`segments` = ids of queries [B, L] and of keys
    [B, S]) are equal and, if `causal`, the key's place in the row is not after the query's; where
    they do not stand in the order of their rows, `places` (of queries and keys) says which it is.
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
        if places is not None:
            of_query, of_key = places
            past = of_key[:, None, None, None, :] <= of_query[:, None, None, :, None]
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxSxGxd.dtype)
    return jnp.einsum("BGRLS,BSGd->BLGRd", weights, v_BxSxGxd).reshape(B, L, H, d)
