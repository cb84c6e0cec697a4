"""A tiny model with DPVR, rows with text slots, and DPVR once more in numpy with masks only.

The restatement runs every layer over whole rows in float64 and hides what a path does not see by
[L, L] masks; it shares no code with the package.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cli_jax.config import ComputeConfig, ModelConfig, RoutingConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.model.vlm import VLM, build
from tests.fusion import tiny
from tests.fusion.restatement import aligned, float64, injected, patch_slots, pictures, projected
from tests.fusion.rows import IMAGE, VISION
from tests.train.train_tiny import QUICK

PLAIN = NoneConfig()
TEXT_SLOTS = 40


def with_text(batch, slots=TEXT_SLOTS):
    """The batch with text slots, filled in by a plain loop."""
    rows, length = batch["input_ids"].shape
    position = np.full((rows, slots), length, np.int32)
    index = np.full((rows, length), slots, np.int32)
    for b in range(rows):
        slot = 0
        for at in range(length):
            if batch["segment_ids"][b, at] and not is_vision(batch)[b, at]:
                position[b, slot], index[b, at] = at, slot
                slot += 1
    return {**batch, "text_position": position, "text_index": index}


def is_vision(batch):
    """bool [B, L]: patches and newlines."""
    found = np.zeros(batch["input_ids"].shape, bool)
    for b, positions in enumerate(batch["visual_position"]):
        found[b, positions[positions < found.shape[1]]] = True
    return found


def is_text(batch):
    return (batch["segment_ids"] > 0) & ~is_vision(batch)


@functools.cache
def packed():
    return with_text(tiny.packed())


def model(saturation=2, fusion=PLAIN, *, text=tiny.TEXT, **compute) -> VLM:
    compute = {"dtype": "float32", "remat": "none", **compute}
    return build(
        ModelConfig(
            VISION, text, IMAGE, tiny.name_of(fusion), fusion,
            routing=RoutingConfig("dpvr", saturation),
        ),
        ComputeConfig(**compute),
    )  # fmt: skip


@functools.cache
def redrawn(fusion=PLAIN):
    """Parameters none of which is zero, one or equal to another, the side branch's included."""
    m, rng = model(1), np.random.default_rng(7)
    boxed = jax.eval_shape(lambda: m.init(jax.random.key(0), packed())["params"])

    def draw(path, shape):
        noise = rng.normal(size=shape)
        if path[-1] in ("scale", "bias"):
            return (path[-1] == "scale") + 0.1 * noise
        return noise / np.sqrt(shape[0])

    own = flatten_dict(nn.meta.unbox(boxed)["routing"])
    drawn = {path: np.float32(draw(path, leaf.shape)) for path, leaf in own.items()}
    return {**tiny.redrawn(fusion), "routing": unflatten_dict(drawn)}


def forward(saturation=2, fusion=PLAIN, scan_layers=True):
    """Compiled (params, batch) -> logits [B, L, vocab], zero where there is no text."""
    return _forward(saturation, fusion, scan_layers)


@functools.cache
def _forward(saturation, fusion, scan_layers):
    m = model(saturation, fusion, scan_layers=scan_layers)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, batch):
        out = m.apply({"params": params}, batch)
        return m.apply({"params": params}, out.hidden, method="logits")

    return lambda params, batch: np.asarray(run(params, batch))


# ---- the restatement -----------------------------------------------------------------------------


def normed(c, scale, h):
    return h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + c.rms_norm_eps) * scale


def turned(c, x, positions):
    """x [L, heads, d] by the rotary angles of the positions."""
    d = c.head_dim
    angle = positions[:, None] * c.rope_theta ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer(c, w, h, positions, sees):
    """One decoder layer over a whole row h [L, D]; sees [L, L]: query i may attend to key j."""
    attention = w["self_attn"]
    x = normed(c, w["input_layernorm"]["scale"], h)

    def heads(name):
        y = x @ attention[name]["kernel"] + attention[name].get("bias", 0)
        return y.reshape(len(h), -1, c.head_dim)

    q, k = (turned(c, heads(name), positions) for name in ("q_proj", "k_proj"))
    v, out = heads("v_proj"), np.zeros_like(q)
    for head in range(c.num_attention_heads):
        own = head * c.num_key_value_heads // c.num_attention_heads
        for i in np.flatnonzero(sees.any(1)):
            scores = k[sees[i], own] @ q[i, head] / np.sqrt(c.head_dim)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[sees[i], own]
    h = h + out.reshape(len(h), -1) @ attention["o_proj"]["kernel"]
    x, mlp = normed(c, w["post_attention_layernorm"]["scale"], h), w["mlp"]
    gate = x @ mlp["gate_proj"]["kernel"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ mlp["up_proj"]["kernel"])
    return h + hidden @ mlp["down_proj"]["kernel"]


def reference(saturation, params, batch, fusion=PLAIN, text=tiny.TEXT):
    """Logits [B, L, vocab] of all rows; only those at text positions mean something."""
    base = tiny.without_fusion({k: v for k, v in params.items() if k != "routing"})
    tower = tiny.model(PLAIN)
    layers = tuple(range(VISION.last_layer + 1))
    hidden = float64(tower.apply({"params": base}, batch["pixel_values"], layers, method="vision"))
    wide = float64(params)
    language, side = wide["language_model"], wide["routing"]["side_branch"]
    h = language["embed_tokens"]["embedding"][batch["input_ids"]]
    for b, slot in np.argwhere(batch["visual_newline"]):
        h[b, batch["visual_position"][b, slot]] = wide["image_newline"]
    for b, i in pictures(batch):
        for slot in patch_slots(batch, b, i):
            h[b, batch["visual_position"][b, slot]] = projected(wide, batch, b, slot, hidden[-1][b])
    points = getattr(fusion, "inject", ())
    Vhat = aligned(fusion, wide, batch, hidden) if points else {}

    length = h.shape[1]
    order = np.arange(length)
    segment, vision, words = batch["segment_ids"], is_vision(batch), is_text(batch)
    past = (order[None, :] <= order[:, None]) & (segment[:, :, None] == segment[:, None, :])
    past &= (segment > 0)[:, :, None]

    def run(w, sees):
        rows = zip(h, batch["positions"].astype(np.float64), sees, strict=True)
        return np.stack([layer(text, w, *row) for row in rows])

    n = text.num_hidden_layers
    for t in range(saturation):
        if t in points:
            h, _ = injected(fusion, wide, batch, Vhat, points.index(t), h)
        h = run(at_layer(language, t), past)
    from_side = run(side, past & vision[:, :, None] & vision[:, None, :])
    for t in range(saturation, n - 1):
        h = run(at_layer(language, t), past & words[:, :, None] & words[:, None, :])
    h = np.where(vision[:, :, None], from_side, h)
    h = run(at_layer(language, n - 1), past & words[:, :, None])
    return normed(text, language["norm"]["scale"], h) @ language["embed_tokens"]["embedding"].T


def at_layer(language, t):
    return jax.tree.map(lambda x: x[t], language["layers"])


def identity_side(params):
    """The side branch that changes nothing."""
    side = flatten_dict(params["routing"]["side_branch"])
    for path in (("self_attn", "o_proj", "kernel"), ("mlp", "down_proj", "kernel")):
        side[path] = jnp.zeros_like(side[path])
    return {**params, "routing": {"side_branch": unflatten_dict(side)}}


def deeper(layers):
    return dataclasses.replace(tiny.TEXT, num_hidden_layers=layers)
