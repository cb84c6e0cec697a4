"""Splash attention (Pallas) for TPU: blocks of scores that live in the core's memory only.

The kernel is not partitioned by the compiler, so it runs inside `shard_map`: every device works on
its own rows and heads.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128  # the kernel's block sizes are multiples of this
MAX_BLOCK = 512  # compiled for v5e, v5p and v6e; larger ones were not tried
PAD_SEGMENT = -1  # of the padding at a row's end: its queries see its own keys and nothing else


def splash_attention(
    q_BxLxHxd: jax.Array,
    k_BxLxGxd: jax.Array,
    v_BxLxGxd: jax.Array,
    segment_ids_BxL: jax.Array | None,
    *,
    causal: bool,
    heads: tuple[str, str] = ("heads", "kv_heads"),
    interpret: bool = False,
) -> jax.Array:
    """`model/attention.py` for queries and keys of the same rows; heads H a multiple of G.

    `heads` are the logical axes of query and key heads. Where the mesh splits only the former, the
    keys and values are repeated for each query head, so that a device's heads find theirs.
    """
    B, L = q_BxLxHxd.shape[:2]
    if segment_ids_BxL is None:
        segment_ids_BxL = jnp.ones((B, L), jnp.int32)
    by_query, by_key = (nn.logical_to_mesh_axes(("batch", "length", h, None)) for h in heads)
    if by_query != by_key:
        repeats = q_BxLxHxd.shape[2] // k_BxLxGxd.shape[2]
        k_BxLxGxd, v_BxLxGxd = (jnp.repeat(x, repeats, axis=2) for x in (k_BxLxGxd, v_BxLxGxd))
    local = functools.partial(_local, causal=causal, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, segment_ids_BxL)
    rows = nn.logical_to_mesh_axes(("batch", "length"))
    return jax.shard_map(
        local,
        in_specs=(by_query, by_query, by_query, rows),
        out_specs=by_query,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )(q_BxLxHxd, k_BxLxGxd, v_BxLxGxd, segment_ids_BxL)


def _local(q, k, v, segment_ids, *, causal: bool, interpret: bool) -> jax.Array:
    """One device's rows and heads; rows are padded to whole blocks."""
    L, H, d = q.shape[1:]
    padding = -L % LANES
    block = block_size(L + padding)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=PAD_SEGMENT)
    attend = _kernel(H, L + padding, block, causal, interpret)
    # The kernel does not scale. A power of two is exact in any precision, other scales round once.
    out = jax.vmap(attend)(
        padded(q * jnp.asarray(d**-0.5, q.dtype)),
        padded(k),
        padded(v),
        kernels.SegmentIds(q=ids, kv=ids),
    )
    return out.swapaxes(1, 2)[:, :L].astype(q.dtype)


def block_size(length: int) -> int:
    """The largest block, a multiple of the lanes, that divides a length of whole lanes."""
    return next(size for size in range(MAX_BLOCK, 0, -LANES) if length % size == 0)


def _kernel(heads: int, length: int, block: int, causal: bool, interpret: bool):
    one = masks.CausalMask if causal else masks.FullMask
    mask = masks.MultiHeadMask([one((length, length))] * heads)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
