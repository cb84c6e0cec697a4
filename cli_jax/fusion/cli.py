"""`cli`: Cross-Layer Injection. AMP aligns many vision layers, AGF lets many decoder layers choose.

The formulas are docs/method.md section 1:

    Vhat_k = P(V_k) + (alpha/r) B_k A_k V_k                                    AMP
    c_v[t,k] = softmax_j(q_v . x_kj / sqrt(D)) x_kj    x = rms(Vhat_k)         per image
    c_h[t]   = softmax_j(q_h . y_j  / sqrt(D)) y_j     y = rms(h)              per image
    W[t,k]   = sigmoid(w . [c_v ; c_h] + b)                                    AGF
    h[pos]  += sum_k W[t,k] Vhat_k[pos]                visual positions only

c_v does not depend on h, so it is computed once per image, next to Vhat_k; what an injection point
does is one pooling of h and one weighted sum over the bank of Vhat.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.config import TextConfig, VisionConfig
from cli_jax.fusion import base
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import place, take_or_zero
from cli_jax.model.layers import partitioned
from cli_jax.model.projector import Projector
from cli_jax.model.stack import rematerialize

RMS_EPSILON = 1e-6
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class CLIConfig:
    """Taps, injection points and the two modules.

    taps      vision layers: indices, `all`, or `every:m` counted back from the last one used
    inject    decoder layers: indices, `all`, or `every:m` from layer 0
    rank      r of the LoRA branches; alpha = 0 means alpha = r; amp = False turns AMP off
    agf       `gated`, or the ablations without gates: `mean` (W = 1/K) and `one` (W = 1)
    gate      `scalar`, or `channel`: W in R^D through a map of rank `gate_rank`
    per_pair  gate weights per (decoder layer, vision layer) instead of shared over vision layers
    context   what c_h pools: `image`, the picture's own positions (causal by construction, but
              blind to a question that follows the picture), or `prompt`, everything of the sample
              before the first answer token after the picture (needs data.labels=answer_only)
    """

    taps: base.LayerSpec = "every:3"
    inject: base.LayerSpec = "every:3"
    amp: bool = True
    rank: int = 64
    alpha: float = 0.0
    agf: Literal["gated", "mean", "one"] = "gated"
    gate: Literal["scalar", "channel"] = "scalar"
    gate_rank: int = 64
    per_pair: bool = False
    gate_bias_init: float = -2.0
    context: Literal["image", "prompt"] = "image"


class CLI(base.Fusion):
    """AMP and AGF; the decoder's input sequence stays that of `none`."""

    Config = CLIConfig

    @classmethod
    def taps(cls, config: CLIConfig, vision: VisionConfig) -> tuple[int, ...]:
        """The K layers of the bank."""
        return base.tap_layers(config.taps, vision)

    @classmethod
    def vision_layers(cls, config: CLIConfig, vision: VisionConfig) -> tuple[int, ...]:
        return tuple(sorted({*cls.taps(config, vision), vision.last_layer}))

    @classmethod
    def decoder_layers(cls, config: CLIConfig, text: TextConfig) -> tuple[int, ...]:
        return base.injection_layers(config.inject, text)

    @classmethod
    def needs_prompt_context(cls, config: CLIConfig) -> bool:
        return config.agf == "gated" and config.context == "prompt"

    @nn.compact
    def __call__(self, taps_KxBxMNxV: jax.Array, batch: Batch, projector: Projector) -> base.Fused:
        config: CLIConfig = self.model.fusion
        emitted = self.vision_layers(config, self.model.vision)
        wanted = self.taps(config, self.model.vision)
        features = base.project(
            taps_KxBxMNxV[emitted.index(self.model.vision.last_layer)], batch, projector
        )
        points = self.decoder_layers(config, self.model.text)
        lora = AMP(config, len(wanted), features.shape[-1], self.param_dtype, name="amp")(
            taps_KxBxMNxV.shape[-1]
        )
        gates = AGF(config, len(points), len(wanted), self.param_dtype, name="agf")(
            features.shape[-1]
        )
        align = self._align(projector, lora is not None, gates, batch)
        bank_KxBxPxD, context_KxTxBxIxD = self._scan(
            align, (taps_KxBxMNxV[jnp.array([emitted.index(k) for k in wanted])], lora)
        )
        xs: dict[str, Any] = {"gate": gates, "context": None}
        if gates is not None:
            xs["context"] = jnp.swapaxes(context_KxTxBxIxD, 0, 1)
        else:
            xs["index"] = jnp.arange(len(points))
        return base.Fused(
            features,
            Injection(points, lambda h, point: inject(config, bank_KxBxPxD, batch, h, point), xs),
        )

    def _align(self, projector: Projector, has_lora: bool, gates: Any, batch: Batch):
        """One tap -> its aligned features Vhat_k and its half of every gate, c_v[:, k]."""
        config: CLIConfig = self.model.fusion
        module, variables = projector.unbind()
        scale = (config.alpha or config.rank) / config.rank
        patch_BxP = base.is_patch(batch)
        member_BxIxP = _slots_of_image(batch)

        def align(tap: Any) -> tuple[jax.Array, jax.Array | None]:
            V_BxMNxV, lora = tap
            hidden: Any = module.apply(variables, V_BxMNxV, method="hidden")
            Vhat_BxPxD: Any = module.apply(
                variables, base.gather_patches(hidden, batch), method="output"
            )
            if has_lora:
                A_Vxr, B_rxD = (w.astype(self.dtype) for w in lora)
                low_BxPxr = base.gather_patches(V_BxMNxV @ A_Vxr, batch)
                Vhat_BxPxD = Vhat_BxPxD + scale * (low_BxPxr @ B_rxD)
            Vhat_BxPxD = Vhat_BxPxD * patch_BxP[..., None]
            if gates is None:
                return Vhat_BxPxD, None
            c_v = pool(gates["query_visual"], Vhat_BxPxD, member_BxIxP)
            return Vhat_BxPxD, c_v

        return align

    def _scan(self, align, taps):
        remat = rematerialize(align, self.remat)
        _, out = jax.lax.scan(
            lambda _, tap: (None, remat(tap)), None, taps, unroll=True if self.unroll else 1
        )
        return out


def inject(
    config: CLIConfig, bank_KxBxPxD: jax.Array, batch: Batch, h_BxLxD: jax.Array, point: Any
) -> tuple[jax.Array, jax.Array | None]:
    """h[pos] += sum_k W[t, k] Vhat_k[pos] at visual positions -> (h, W [B, I, K(, D)])."""
    K, D = bank_KxBxPxD.shape[0], bank_KxBxPxD.shape[-1]
    gates = None
    if config.agf == "gated":
        member_BxIxL = _context_of_image(config, batch)
        c_h_BxIxD = pool(point["gate"]["query_hidden"][None], h_BxLxD, member_BxIxL)[0]
        gates = gate(point["gate"], point["context"], c_h_BxIxD)
        W_KxBxPx1orD = _per_slot(gates, batch).astype(bank_KxBxPxD.dtype)
        gates = gates[..., 0] if config.gate == "scalar" else gates
        delta_BxPxD = jnp.sum(W_KxBxPx1orD * bank_KxBxPxD, axis=0, dtype=jnp.float32)
    else:
        delta_BxPxD = jnp.sum(bank_KxBxPxD, axis=0, dtype=jnp.float32)
        if config.agf == "mean":
            delta_BxPxD = delta_BxPxD / K
    added = place(
        delta_BxPxD.astype(h_BxLxD.dtype).reshape(h_BxLxD.shape[0], -1, D),
        batch["visual_index"],
        batch["visual_position"],
    )
    return h_BxLxD + added, gates


def gate(params: Batch, c_v_KxBxIxD: jax.Array, c_h_BxIxD: jax.Array) -> jax.Array:
    """W [B, I, K, 1 or D] = sigmoid(w . [c_v ; c_h] + b), in float32."""
    K, B, I, D = c_v_KxBxIxD.shape  # noqa: E741
    c_h = jnp.broadcast_to(c_h_BxIxD, c_v_KxBxIxD.shape)
    c_KxBIx2D = jnp.concatenate([c_v_KxBxIxD, c_h], axis=-1).reshape(K, B * I, 2 * D)
    w = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    logits = c_KxBIx2D @ w["gate_kernel"]
    if "gate_up" in w:
        logits = logits @ w["gate_up"]
    logits = logits + w["gate_bias"][:, None]
    return jnp.moveaxis(jax.nn.sigmoid(logits).reshape(K, B, I, -1), 0, 2)


def pool(query_TxD: jax.Array, x_BxJxD: jax.Array, member_BxIxJ: jax.Array) -> jax.Array:
    """Query-pooled context [T, B, I, D] of every image: softmax_j(q . rms(x_j) / sqrt(D)) rms(x_j).

    The softmax runs over an image's own members only; an image without members pools to zero.
    rms(x) is x times one number per position, so it is never stored.
    """
    D = x_BxJxD.shape[-1]
    x32 = x_BxJxD.astype(jnp.float32)
    scale_BxJ = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + RMS_EPSILON)
    scores_TxBxJ = jnp.einsum(
        "td,bjd->tbj",
        query_TxD.astype(x_BxJxD.dtype),
        x_BxJxD,
        preferred_element_type=jnp.float32,
    )
    scores_TxBxJ = scores_TxBxJ * scale_BxJ * D**-0.5
    scores = jnp.where(member_BxIxJ, scores_TxBxJ[:, :, None], -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weight = jnp.where(
        member_BxIxJ, jnp.exp(scores_TxBxJ[:, :, None] - jnp.where(jnp.isfinite(top), top, 0)), 0
    )
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1) * scale_BxJ[:, None]
    return jnp.einsum(
        "tbij,bjd->tbid",
        weight.astype(x_BxJxD.dtype),
        x_BxJxD,
        preferred_element_type=jnp.float32,
    )


def _slots_of_image(batch: Batch) -> jax.Array:
    """bool [B, I, P]: patch slots (no newlines) of each image."""
    image = jnp.arange(batch["image_segment"].shape[1])
    own = batch["visual_image"][:, None, :] == image[None, :, None]
    return own & base.is_patch(batch)[:, None]


def _context_of_image(config: CLIConfig, batch: Batch) -> jax.Array:
    """bool [B, I, L]: the positions that c_h of each image pools."""
    if config.context == "image":
        slots_BxPxI = jnp.swapaxes(_slots_of_image(batch), 1, 2)
        positions_BxLxI = take_or_zero(slots_BxPxI, batch["visual_index"])
        return jnp.swapaxes(positions_BxLxI, 1, 2)
    segment_BxI, end_BxI = batch["image_segment"], batch["context_end"]
    same_BxIxL = batch["segment_ids"][:, None] == segment_BxI[:, :, None]
    before_BxIxL = jnp.arange(same_BxIxL.shape[-1]) < end_BxI[:, :, None]
    return same_BxIxL & before_BxIxL & (segment_BxI > 0)[:, :, None]


def _per_slot(gates_BxIxKxC: jax.Array, batch: Batch) -> jax.Array:
    """Gates of each slot's image [K, B, P, C]; padding slots hold zeros anyway."""
    image_BxP = jnp.minimum(batch["visual_image"], gates_BxIxKxC.shape[1] - 1)
    per_slot = jax.vmap(lambda gates_IxKxC, image_P: gates_IxKxC[image_P])
    return jnp.moveaxis(per_slot(gates_BxIxKxC, image_BxP), 2, 0)


class AMP(nn.Module):
    """LoRA branches of all taps: A [K, V, r] random, B [K, r, D] zeros; None when AMP is off."""

    config: CLIConfig
    taps: int
    features: int
    param_dtype: Any

    @nn.compact
    def __call__(self, vision_width: int) -> tuple[jax.Array, jax.Array] | None:
        if not self.config.amp:
            return None
        K, V, r, D = self.taps, vision_width, self.config.rank, self.features
        A = self.param(
            "lora_A",
            partitioned(nn.initializers.normal(V**-0.5), ("taps", "vision_embed", "rank")),
            (K, V, r),
            self.param_dtype,
        )
        B = self.param(
            "lora_B",
            partitioned(nn.initializers.zeros, ("taps", "rank", "embed")),
            (K, r, D),
            self.param_dtype,
        )
        return A, B


class AGF(nn.Module):
    """Queries and gates of all injection points, stacked on axis 0; None in the gateless ablations.

    query_visual, query_hidden [T, D]; gate_kernel [T, K', 2D, 1]; gate_bias [T, K', 1], where K' is
    K for `per_pair` gates and 1 for gates shared over vision layers. Channel gates have kernel
    [T, K', 2D, r], a second map gate_up [T, K', r, D] and bias [T, K', D].
    At the start W = sigmoid(gate_bias_init) everywhere.
    """

    config: CLIConfig
    points: int
    taps: int
    param_dtype: Any

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array] | None:
        c, T, D = self.config, self.points, width
        if c.agf != "gated":
            return None
        K, channel = (self.taps if c.per_pair else 1), c.gate == "channel"
        zeros, normal = nn.initializers.zeros, nn.initializers.normal

        def param(name: str, init: Any, *axes: tuple[str | None, int]) -> jax.Array:
            names, shape = zip(("points", T), *axes, strict=True)
            return self.param(name, partitioned(init, names), shape, self.param_dtype)

        params = {
            "query_visual": param("query_visual", normal(D**-0.5), ("embed", D)),
            "query_hidden": param("query_hidden", normal(D**-0.5), ("embed", D)),
            "gate_kernel": param(
                "gate_kernel",
                normal((2 * D) ** -0.5) if channel else zeros,
                ("taps", K),
                ("embed", 2 * D),
                ("rank", c.gate_rank if channel else 1),
            ),
            "gate_bias": param(
                "gate_bias",
                nn.initializers.constant(c.gate_bias_init),
                ("taps", K),
                ("norm", D if channel else 1),
            ),
        }
        if channel:
            params["gate_up"] = param(
                "gate_up", zeros, ("taps", K), ("rank", c.gate_rank), ("embed", D)
            )
        return params
