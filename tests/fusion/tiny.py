"""The smallest model that has everything, and one batch with every case, shared by the tests."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import jaxprs_in_params

from cli_jax.config import ComputeConfig, ModelConfig, TextConfig
from cli_jax.fusion import registry
from cli_jax.image.extras import NO_EXTRAS
from cli_jax.model.vlm import VLM, build
from tests.fusion.rows import BASE_ONLY, IMAGE, VISION, VOCAB, Turn, make_batch, make_sample

TEXT = TextConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=1e4,
)
SIZES = {"length": 96, "visual": 72, "tiles": 9, "images": 4}
# Spread of redrawn parameters, 1/sqrt(fan in) where nothing is said. Large queries make the softmax
# of AGF's pooling choose, so that a wrong member or scale shows.
SPREAD = {
    "query_visual": 2.0,
    "query_hidden": 2.0,
    "gate_kernel": 0.5,
    "gate_up": 0.5,
    "lora_B": 0.3,
    "embedding": 0.5,
    "class_embedding": 0.5,
    "image_newline": 0.5,
}


def conversations(extras=NO_EXTRAS):
    """(two turns with a picture each, no picture, one picture), (two pictures in one turn)."""
    rng = np.random.default_rng(0)
    make = functools.partial(make_sample, rng, extras=extras)
    two_turns = make(Turn([(20, 25)], 4, 3), Turn([BASE_ONLY], 3, 3))
    text_only = make(Turn([], 5, 4))
    one = make(Turn([BASE_ONLY], 3, 4))
    pair = make(Turn([(30, 30), (8, 26)], 5, 3))
    return [two_turns, text_only, one], [pair]


def sizes(extras):
    """Of a batch of `conversations`, with room for what a strategy adds to its pictures."""
    tokens = SIZES["images"] * extras.pooled
    return {
        **SIZES,
        "length": SIZES["length"] + tokens,
        "visual": SIZES["visual"] + tokens,
        "tiles": SIZES["tiles"] + SIZES["images"] * extras.stacks,
        "pooled": extras.pooled,
        "stacks": extras.stacks,
    }


def extras_of(fusion):
    config = config_of(fusion)
    return registry.of(config).extras(fusion, config)


def packed(fusion=None):
    """The conversations as a strategy wants them; without one as `none` does."""
    return _packed(extras_of(fusion) if fusion else NO_EXTRAS)


@functools.cache
def _packed(extras):
    return make_batch(conversations(extras), **sizes(extras))


def tiles_of(batch, b, i):
    """The tiles of a picture, by what its tokens and stacks read."""
    own = batch["visual_image"][b] == i
    read = [
        batch["plan_index"][b, own][batch["plan_weight"][b, own] > 0],
        batch["stack_index"][b, :, i][batch["stack_weight"][b, :, i] > 0],
    ]
    tiles = batch["pixel_values"].shape[1]
    return np.unique(np.concatenate(read)) // (batch["plan_inverse"].shape[1] // tiles)


def name_of(fusion) -> str:
    return next(name for name, s in registry.STRATEGIES.items() if isinstance(fusion, s.Config))


def config_of(fusion, text: TextConfig = TEXT) -> ModelConfig:
    return ModelConfig(VISION, text, IMAGE, name_of(fusion), fusion)


def model(fusion, *, text: TextConfig = TEXT, **compute) -> VLM:
    compute = {"dtype": "float32", "remat": "none", **compute}
    return build(config_of(fusion, text), ComputeConfig(**compute))


def fuse(m, hidden, batch, h):
    """Features, and (h, W) of every injection point on its own, from given hidden states."""
    layers = m.fusion.vision_layers(m.config.fusion, VISION)

    def look(taps, stop, emit, xs, add=False):
        each = [
            emit(hidden[layers.index(k)], jax.tree.map(lambda x, i=i: x[i], xs))
            for i, k in enumerate(taps)
        ]
        outs = (sum(each) if add else jnp.stack(each)) if each else None
        return outs, hidden[layers.index(stop)]

    fused = m.fusion(look, batch, m.multi_modal_projector)
    if fused.injection is None:
        return fused.features, []
    points, inject, xs = fused.injection
    return fused.features, [
        inject(h, jax.tree.map(lambda x, t=t: x[t], xs)) for t in range(len(points))
    ]


def hidden_shape(fusion):
    """[E, B, M*N, V] of the vision hidden states that a strategy is given."""
    layers = registry.get(name_of(fusion)).vision_layers(fusion, VISION)
    B, M = packed(fusion)["pixel_values"].shape[:2]
    return len(layers), B, M * VISION.num_patches, VISION.hidden_size


@functools.cache
def redrawn(fusion):
    """Parameters none of which is zero, one or equal to another."""
    m, rng = model(fusion), np.random.default_rng(1)
    boxed = jax.eval_shape(lambda: m.init(jax.random.key(0), packed(fusion))["params"])

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1] in ("scale", "bias", "gate_bias"):
            return (path[-1] == "scale") + 0.1 * noise
        if path[-1] in SPREAD:
            return SPREAD[path[-1]] * noise
        return noise / np.sqrt(np.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1]))

    shapes = sorted(flatten_dict(nn.meta.unbox(boxed)).items(), key=lambda x: ("fusion" in x[0], x))
    return unflatten_dict({path: np.float32(draw(path, leaf)) for path, leaf in shapes})


@functools.cache
def initial(fusion):
    """The same, but for the strategy's own parameters, which are as a run starts."""
    m, batch = model(fusion), packed(fusion)
    hidden, h = jnp.zeros(hidden_shape(fusion)), jnp.zeros((*batch["input_ids"].shape, 16))
    init = jax.jit(lambda: m.init(jax.random.key(0), hidden, batch, h, method=fuse)["params"])
    return {**redrawn(fusion), "fusion": nn.meta.unbox(init()).get("fusion", {})}


def with_fusion(params, **leaves):
    """`params` with some AGF leaves filled with a number."""
    agf = params["fusion"]["agf"]
    filled = {name: jnp.full_like(agf[name], value) for name, value in leaves.items()}
    return {**params, "fusion": {**params["fusion"], "agf": {**agf, **filled}}}


def without_fusion(params):
    return {name: leaf for name, leaf in params.items() if name != "fusion"}


@functools.cache
def forward(fusion, options=(), **compute):
    """Compiled (params, batch) -> (logits [B, L, vocab], gates); `options`: the compiler's."""
    m = model(fusion, **compute)

    def run(params, batch):
        out = m.apply({"params": params}, batch)
        return m.apply({"params": params}, out.hidden, method="logits"), out.gates

    compiled = jax.jit(run, compiler_options=dict(options))

    def on_host(params, batch):
        return jax.tree.map(np.asarray, compiled(params, batch))

    return on_host


def everything(jaxpr):
    """The shape of every array that a traced program makes, at any depth."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(equation.params):
            yield from everything(inner)
