"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax


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
    heads are never stored, one byte per pair of positions is.
    """
    mask = None
    if segment_ids_BxL is not None:
        mask = (segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, mask=mask, is_causal=causal, implementation="cudnn"
    )
