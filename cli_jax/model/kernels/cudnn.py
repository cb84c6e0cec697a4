"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cudnn_attention(
    q_BxLxHxd: jax.Array,
    k_BxLxGxd: jax.Array,
    v_BxLxGxd: jax.Array,
    segment_ids_BxL: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """`model/attention.py` for queries and keys of the same rows, in 16-bit dtypes.

    Its public interface knows no segment ids, so they become a mask [B, 1, L, L]: the scores of all
    heads are never stored, two bytes per pair of positions are. JAX refuses gradients of odd
    lengths, such as the 729 patches of a tile: those get one position more, which nobody attends.
    """
    B, L = q_BxLxHxd.shape[:2]
    odd = L % 2
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q_BxLxHxd, k_BxLxGxd, v_BxLxGxd)
    )
    mask = lengths_B = None
    if segment_ids_BxL is not None:
        ids = jnp.pad(segment_ids_BxL, ((0, 0), (0, odd)), constant_values=-1)
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    elif odd:
        lengths_B = jnp.full((B,), L, jnp.int32)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )
    return out[:, :L]
