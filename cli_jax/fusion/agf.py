"""AGF, Adaptive Gating Fusion: how much of each vision layer a decoder layer takes, per image.

The formulas are docs/method.md section 1:

    c_v[t,k] = softmax_j(q_v . x_kj / sqrt(D)) x_kj    x = rms(Vhat_k), over an image's patches
    c_h[t]   = softmax_j(q_h . y_j  / sqrt(D)) y_j     y = rms(h), over an image's context
    W[t,k]   = sigmoid(w . [c_v[t,k] ; c_h[t]] + b)

c_v does not depend on h, so w's first half meets it once per image, before the decoder runs
(`visual_half`); an injection point adds the other half (`gates`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.model.layers import partitioned

RMS_EPSILON = 1e-6
Params = dict[str, jax.Array]


class AGF(nn.Module):
    """Queries and gates of all injection points, stacked on axis 0.

    query_visual, query_hidden [T, D]; gate_kernel [T, G, 2D, 1]; gate_bias [T, G, 1], where G is
    K for gates of their own per vision layer and 1 for gates shared over vision layers. Channel
    gates have kernel [T, G, 2D, r], a second map gate_up [T, G, r, D] and bias [T, G, D].
    At the start W = sigmoid(bias_init) everywhere.
    """

    points: int  # T
    groups: int  # G
    channel_rank: int  # r; 0 = scalar gates
    bias_init: float
    param_dtype: Any

    @nn.compact
    def __call__(self, width: int) -> Params:
        T, G, D, r = self.points, self.groups, width, self.channel_rank
        zeros, normal = nn.initializers.zeros, nn.initializers.normal

        def param(name: str, init: Any, *axes: tuple[str | None, int]) -> jax.Array:
            names, shape = zip(("points", T), *axes, strict=True)
            return self.param(name, partitioned(init, names), shape, self.param_dtype)

        params = {
            "query_visual": param("query_visual", normal(D**-0.5), ("embed", D)),
            "query_hidden": param("query_hidden", normal(D**-0.5), ("embed", D)),
            "gate_kernel": param(
                "gate_kernel",
                normal((2 * D) ** -0.5) if r else zeros,
                ("taps", G),
                ("embed", 2 * D),
                ("rank", r or 1),
            ),
            "gate_bias": param(
                "gate_bias",
                nn.initializers.constant(self.bias_init),
                ("taps", G),
                ("norm", D if r else 1),
            ),
        }
        if r:
            params["gate_up"] = param("gate_up", zeros, ("taps", G), ("rank", r), ("embed", D))
        return params


def pool(query_TxD: jax.Array, x_BxJxD: jax.Array, member_BxIxJ: jax.Array) -> jax.Array:
    """Query-pooled context [B, T, I, D] of every image: softmax_j(q . rms(x_j) / sqrt(D)) rms(x_j).

    The softmax runs over an image's own members only; an image without members pools to zero.
    rms(x) is x times one number per position, so it is never stored. float32, but for the operands
    of the two products.
    """
    x32 = x_BxJxD.astype(jnp.float32)
    scale_BxJ = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + RMS_EPSILON)
    scores_BxTxJ = jnp.einsum(
        "bjd,td->btj",
        x_BxJxD,
        query_TxD.astype(x_BxJxD.dtype),
        preferred_element_type=jnp.float32,
    )
    scores_BxTx1xJ = (scores_BxTxJ * scale_BxJ[:, None] * x_BxJxD.shape[-1] ** -0.5)[:, :, None]
    member_Bx1xIxJ = member_BxIxJ[:, None]
    scores_BxTxIxJ = jnp.where(member_Bx1xIxJ, scores_BxTx1xJ, jnp.finfo(jnp.float32).min)
    weight_BxTxIxJ = jax.nn.softmax(scores_BxTxIxJ, axis=-1) * member_Bx1xIxJ
    return jnp.einsum(
        "btij,bjd->btid",
        (weight_BxTxIxJ * scale_BxJ[:, None, None]).astype(x_BxJxD.dtype),
        x_BxJxD,
        preferred_element_type=jnp.float32,
    )


def visual_half(params: Params, c_v_KxBxTxIxD: jax.Array) -> jax.Array:
    """What the pictures say about every gate [T, K, B, I, r], in float32."""
    c_v_TxKxBxIxD = jnp.moveaxis(c_v_KxBxTxIxD, 2, 0)
    kernel_TxGxDxr, _ = jnp.split(params["gate_kernel"].astype(jnp.float32), 2, axis=2)
    return c_v_TxKxBxIxD @ kernel_TxGxDxr[:, :, None]


def gates(
    params: Params, visual_KxBxIxr: jax.Array, h_BxLxD: jax.Array, context_BxIxL: jax.Array
) -> jax.Array:
    """W [K, B, I, 1 or D] in (0, 1) of one injection point, in float32.

    `params` are the point's own (AGF's without the leading T); `visual` is its `visual_half`.
    """
    c_h_BxIxD = pool(params["query_hidden"][None], h_BxLxD, context_BxIxL)[:, 0]
    w = {name: x.astype(jnp.float32) for name, x in params.items()}
    _, kernel_GxDxr = jnp.split(w["gate_kernel"], 2, axis=1)
    logits_KxBxIxC = visual_KxBxIxr + c_h_BxIxD @ kernel_GxDxr[:, None]
    if "gate_up" in w:
        logits_KxBxIxC = logits_KxBxIxC @ w["gate_up"][:, None]
    return jax.nn.sigmoid(logits_KxBxIxC + w["gate_bias"][:, None, None])
