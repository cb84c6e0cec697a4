"""`cli`: Cross-Layer Injection. AMP aligns many vision layers, AGF lets many decoder layers choose.

The formulas are docs/method.md section 1:

    Vhat_k   = P(V_k) + (alpha/r) B_k A_k V_k                    AMP
    W[t,k]   = how much of tap k decoder layer t takes           AGF (`agf.py`)
    h[pos]  += sum_k W[t,k] Vhat_k[pos]                          visual positions only

The bank of all Vhat is made once, before the decoder runs; what an injection point does is one
pooling of h and one weighted sum over the bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion import agf, base
from cli_jax.fusion.low_rank import LowRank
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import place, take_or_zero
from cli_jax.model.projector import Projector
from cli_jax.model.vision import Emit

Batch = dict[str, jax.Array]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CLIConfig:
    """Taps, injection points and the two modules.

    taps      vision layers: a list, `all`, `every:m` counted back from the last one used, or
              `at:30%,90%`; an entry of a list is a layer, or a list of layers whose mean is the tap
    inject    decoder layers: indices, `all`, or `every:m` from layer 0
    rank      r of the LoRA branches; alpha = 0 means alpha = r; amp = False turns AMP off
    agf       `gated`, or the ablations without gates: `mean` (W = 1/K) and `one` (W = 1)
    gate      `scalar`, or `channel`: W in R^D through a map of rank `gate_rank`
    per_pair  gate weights per (decoder layer, vision layer) instead of shared over vision layers
    context   what c_h pools: `image`, the picture's own positions (causal by construction, but
              blind to a question that follows the picture), or `prompt`, everything of the sample
              before the first answer token after the picture (needs data.labels=answer_only)
    """

    taps: base.TapSpec = "every:3"
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

    def __post_init__(self) -> None:
        for name in ("rank", "gate_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"fusion.cli.{name} is {getattr(self, name)}: it must be >= 1")
        if self.alpha < 0:
            raise ValueError(f"fusion.cli.alpha is {self.alpha}: use 0 (= rank) or more")


class CLI(base.Fusion):
    """AMP and AGF; the decoder's input sequence stays that of `none`.

    Without gradient at the start: amp/lora_A, behind B = 0; agf/query_visual and query_hidden,
    behind w = 0; with channel gates agf/gate_kernel too, behind gate_up = 0.
    """

    Config = CLIConfig

    @classmethod
    def taps(cls, config: CLIConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        """The K taps of the bank, each as the layers whose mean it is."""
        return base.taps(config.taps, vision)

    @classmethod
    def gated_taps(cls, config: CLIConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        return cls.taps(config, vision) if config.agf == "gated" else ()

    @classmethod
    def vision_layers(cls, config: CLIConfig, vision: VisionConfig) -> tuple[int, ...]:
        return base.layers_of((*cls.taps(config, vision), (vision.last_layer,)))

    @classmethod
    def decoder_layers(cls, config: CLIConfig, text: TextConfig) -> tuple[int, ...]:
        return base.injection_layers(config.inject, text)

    @classmethod
    def banked_taps(cls, config: CLIConfig, vision: VisionConfig) -> tuple[base.Tap, ...]:
        return cls.taps(config, vision)

    @classmethod
    def flops(cls, config: CLIConfig, model: ModelConfig, row: base.Row) -> dict[str, float]:
        K = len(cls.taps(config, model.vision))
        T = len(cls.decoder_layers(config, model.text))
        V, D, r = model.vision.hidden_size, model.text.hidden_size, config.rank
        patches = row.tiles * model.vision.num_patches
        low = 2.0 * r * (patches * V + row.visual * D) + base.plan_flops(r, row.visual)
        inject = 2.0 * T * K * row.visual * D
        pools = 4.0 * T * D * (K * row.visual + row.length)  # scores and sums, of Vhat and of h
        return {
            "projector": (1 + K) * base.project_flops(model, row),
            "amp": K * low if config.amp else 0.0,
            "agf": inject + (pools if config.agf == "gated" else 0.0),
        }

    @classmethod
    def needs_prompt_context(cls, config: CLIConfig) -> bool:
        return config.agf == "gated" and config.context == "prompt"

    @nn.compact
    def __call__(self, look: base.Look, batch: Batch, projector: Projector) -> base.Fused:
        c: CLIConfig = self.model.fusion
        taps = self.taps(c, self.model.vision)
        points = self.decoder_layers(c, self.model.text)
        V, D = self.model.vision.hidden_size, self.model.text.hidden_size
        lora = weights = None
        if c.amp:
            amp = LowRank("taps", len(taps), c.rank, "vision_embed", self.param_dtype, name="amp")
            lora = amp(V, D)
        if c.agf == "gated":
            groups = len(taps) if c.per_pair else 1
            channel_rank = c.gate_rank if c.gate == "channel" else 0
            weights = agf.AGF(
                len(points), groups, channel_rank, c.gate_bias_init, self.param_dtype, name="agf"
            )(D)
        slots_BxIxP = _slots_of_image(batch)
        bank_KxBxPxD, last_BxMNxV = self.look_at_taps(
            look, taps, self._align(batch, projector), lora
        )
        features_BxPxD = base.project(last_BxMNxV, batch, projector)
        xs = None
        if weights is not None:
            c_v_KxBxTxIxD = self.each(
                lambda Vhat_BxPxD: agf.pool(weights["query_visual"], Vhat_BxPxD, slots_BxIxP),
                bank_KxBxPxD,
            )
            xs = weights, agf.visual_half(weights, c_v_KxBxTxIxD)
        inject = _injector(c, bank_KxBxPxD, batch, slots_BxIxP)
        return base.Fused(features_BxPxD, Injection(points, inject, xs))

    def _align(self, batch: Batch, projector: Projector) -> Emit:
        """One tap V_k [B, M*N, V] and its LoRA weights -> its aligned features Vhat_k [B, P, D]."""
        c: CLIConfig = self.model.fusion
        if self.is_initializing():  # parameters are made outside of scans
            projector.output(projector.hidden(jnp.zeros((1, 1, self.model.vision.hidden_size))))
        P, variables = projector.unbind()

        def align(V_BxMNxV: jax.Array, lora: Any) -> jax.Array:
            Vhat_BxPxD = base.project(V_BxMNxV, batch, P.bind(variables))
            if lora is None:
                return Vhat_BxPxD
            A_Vxr, B_rxD = (w.astype(self.dtype) for w in lora)
            low_BxPxr = base.gather_patches(V_BxMNxV @ A_Vxr, batch)
            return Vhat_BxPxD + (c.alpha or c.rank) / c.rank * (low_BxPxr @ B_rxD)

        return align


def _injector(
    config: CLIConfig, bank_KxBxPxD: jax.Array, batch: Batch, slots_BxIxP: jax.Array
) -> Callable[[jax.Array, Any], tuple[jax.Array, jax.Array | None]]:
    """h[pos] += sum_k W[t, k] Vhat_k[pos] at the visual positions; gives h and W [B, I, K(, D)]."""
    context_BxIxL = _context_of_image(config, batch, slots_BxIxP)

    def inject(h_BxLxD: jax.Array, point: Any) -> tuple[jax.Array, jax.Array | None]:
        if config.agf == "gated":
            weights, visual_KxBxIxr = point
            W_KxBxIxC = agf.gates(weights, visual_KxBxIxr, h_BxLxD, context_BxIxL)
            W = _per_slot(W_KxBxIxC.astype(bank_KxBxPxD.dtype), slots_BxIxP)
            gates = jnp.moveaxis(W_KxBxIxC, 0, 2)
            gates = gates[..., 0] if config.gate == "scalar" else gates
        else:
            W = jnp.float32(1 if config.agf == "one" else 1 / len(bank_KxBxPxD))
            gates = None
        delta_BxPxD = jnp.sum(W * bank_KxBxPxD, axis=0, dtype=jnp.float32).astype(h_BxLxD.dtype)
        return h_BxLxD + place(delta_BxPxD, batch["visual_index"], batch["visual_position"]), gates

    return inject


def _slots_of_image(batch: Batch) -> jax.Array:
    """bool [B, I, P]: patch slots (no newlines) of each image."""
    image = jnp.arange(batch["image_segment"].shape[1])
    own = batch["visual_image"][:, None, :] == image[None, :, None]
    return own & base.is_patch(batch)[:, None]


def _per_slot(W_KxBxIxC: jax.Array, slots_BxIxP: jax.Array) -> jax.Array:
    """Gates of each slot's image [K, B, P, C], 0 elsewhere: a product with ones, so no scatter."""
    ones = slots_BxIxP.astype(W_KxBxIxC.dtype)
    return jnp.einsum("bip,kbic->kbpc", ones, W_KxBxIxC, precision="highest")


def _context_of_image(config: CLIConfig, batch: Batch, slots_BxIxP: jax.Array) -> jax.Array:
    """bool [B, I, L]: the positions that c_h of each image pools, newlines never."""
    if config.context == "image":
        own_BxLxI = take_or_zero(jnp.swapaxes(slots_BxIxP, 1, 2), batch["visual_index"])
        return jnp.swapaxes(own_BxLxI, 1, 2)
    newline_BxLx1 = take_or_zero(batch["visual_newline"][..., None], batch["visual_index"])
    segment_BxI, end_BxI = batch["image_segment"], batch["context_end"]
    same_BxIxL = batch["segment_ids"][:, None] == segment_BxI[:, :, None]
    before_BxIxL = jnp.arange(same_BxIxL.shape[-1]) < end_BxI[:, :, None]
    real_BxIx1 = (segment_BxI > 0)[:, :, None]
    return same_BxIxL & before_BxIxL & real_BxIx1 & ~newline_BxLx1[:, None, :, 0]


def constant_gates(config: CLIConfig, params: Params, W: np.ndarray) -> tuple[CLIConfig, Params]:
    """The ablation "trained gates replaced by their mean": W [T, K] (or [T, K, D]) for every image.

    params: the trained model's `fusion` parameters. In the result every pair has its own bias and
    the gate's weights are zero. Raises ValueError if the config has no gates.
    """
    if config.agf != "gated":
        raise ValueError(f"fusion.cli.agf is {config.agf!r}: only `gated` has gates to replace")
    T, K = W.shape[:2]
    trained = params["agf"]
    with np.errstate(divide="ignore"):  # a gate of exactly 0 or 1 has an infinite bias
        bias = (np.log(W) - np.log1p(-W)).reshape(T, K, -1)
    shape = T, K, trained["gate_bias"].shape[-1]
    constant = {"gate_bias": np.broadcast_to(bias, shape).astype(trained["gate_bias"].dtype)}
    for name in {"gate_kernel", "gate_up"} & set(trained):
        constant[name] = np.zeros((T, K, *trained[name].shape[2:]), trained[name].dtype)
    return dataclasses.replace(config, per_pair=True), {**params, "agf": {**trained, **constant}}
