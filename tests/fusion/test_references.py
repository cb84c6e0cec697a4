"""Logits of strategies against transformers' models with the same strategy written in torch.

transformers runs its own tower, any-resolution packing and decoder; its projector is replaced, or
hooks add features before its decoder layers. Bound and prompts are those of tests/model.
"""

import copy
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

pytest.importorskip("torch")

import torch

from cli_jax.fusion.adapter import AdapterConfig
from cli_jax.fusion.layer_concat import LayerConcatConfig
from cli_jax.fusion.mmfuser import MMFuserConfig, MSDeformAttn, sample
from cli_jax.fusion.none import NoneConfig
from cli_jax.fusion.sli import SLIConfig
from cli_jax.model.vlm import build
from tests.fusion.tiny import name_of
from tests.model import oracle, reference
from tests.model.samples import batch_of
from tests.train.train_tiny import QUICK

ROWS = (("shrunk_and_cut",), ("no_picture", "two_pictures", "tall"))
LENGTH = 256
EPSILON = 1e-6


@functools.cache
def drawn(name, fusion):
    """(model config, parameters) of a case of tests/model, the strategy's own drawn, too."""
    right = oracle.case(name)
    config = dataclasses.replace(right.config, fusion_name=name_of(fusion), fusion=fusion)
    batch, _ = batch_of([["one_tile"]], right.prompts, config, length=60)
    init = build(config, oracle.LOOPED).init
    boxed = jax.eval_shape(init, jax.random.key(0), batch)["params"]
    shapes = flatten_dict(nn.meta.unbox(boxed))
    rng, params = np.random.default_rng(5), flatten_dict(right.params)
    assert {path for path in params if path not in shapes} in (
        set(),
        {path for path in params if path[0] == "multi_modal_projector"},
    )

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1] == "kernel":
            return noise / np.sqrt(leaf.shape[-2])
        return (path[-1] == "scale") + 0.3 * noise

    new = {path: leaf for path, leaf in shapes.items() if path not in params}
    assert all(path[0] == "fusion" for path in new)
    params |= {path: np.float32(draw(path, leaf)) for path, leaf in new.items()}
    return config, unflatten_dict({path: params[path] for path in shapes})


def errors(name, fusion, logits_of):
    """Our largest logit error of every prompt; `logits_of(prompt's inputs, fusion parameters)`."""
    right = oracle.case(name)
    config, params = drawn(name, fusion)
    batch, places = batch_of(ROWS, right.prompts, config, length=LENGTH)
    model = build(config, oracle.SCANNED)
    ours = np.asarray(
        jax.jit(lambda *args: oracle.logits(model, *args), compiler_options=QUICK)(params, batch)
    )
    own = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params.get("fusion", {}))
    with torch.no_grad():
        theirs = {
            p.name: logits_of(oracle.reference_inputs(right, right.prompts[p.name]), own)
            for p in places
        }
    plain = oracle.reference_logits(name, "tall")
    assert oracle.error(theirs["tall"], plain) > 0.1  # the strategy does something
    return {p.name: oracle.error(p.of(ours), theirs[p.name]) for p in places}


def within(found):
    assert len(found) == 4
    assert {name: e for name, e in found.items() if not e <= oracle.BOUND} == {}


def linear(own):
    """An nn.Linear of our kernel and bias."""
    layer = torch.nn.Linear(*own["kernel"].shape)
    layer.weight.data, layer.bias.data = own["kernel"].T.contiguous(), own["bias"]
    return layer


def with_projector(model, projector):
    """A copy of a transformers model with another projector."""
    other = copy.deepcopy(model)
    other.model.multi_modal_projector = projector
    return other


# ---- none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer"), [("siglip_qwen2", 2), ("clip_llama", 0)])
def test_a_single_other_layer(name, layer):
    """transformers reads any one layer; 0 is the embeddings."""

    def logits_of(inputs, own):
        return oracle.case(name).model(**inputs, vision_feature_layer=[layer]).logits[0].numpy()

    within(errors(name, NoneConfig(vision_layer=layer), logits_of))


# ---- layer_concat --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_llama"])
def test_layer_concat(name):
    """transformers concatenates layers itself, given a list of them."""
    layers = (1, 2, oracle.CONFIGS[name].vision.last_layer)

    def logits_of(inputs, own):
        model = with_projector(oracle.case(name).model, linear(own["linear"]))
        return model(**inputs, vision_feature_layer=list(layers)).logits[0].numpy()

    within(errors(name, LayerConcatConfig(layers=layers), logits_of))


# ---- sli -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "taps", "start"), [("siglip_qwen2", (1, 3), 1), ("clip_llama", (0, 2, 5), 0)]
)
def test_sli(name, taps, start):
    """Features that transformers packs, added by hooks to what enters its decoder layers."""

    def logits_of(inputs, own):
        model = copy.deepcopy(oracle.case(name).model)
        for i, tap in enumerate(taps if "pixel_values" in inputs else ()):
            features = packed(model, inputs, ith_mlp(own["projectors"], i), tap)
            add_before(model, start + i, features, inputs)
        return model(**inputs).logits[0].numpy()

    within(errors(name, SLIConfig(taps=taps, start=start), logits_of))


def ith_mlp(own, i):
    one = {k: {n: x[i] for n, x in own[k].items()} for k in ("linear_1", "linear_2")}
    return torch.nn.Sequential(linear(one["linear_1"]), torch.nn.GELU(), linear(one["linear_2"]))


def packed(model, inputs, mlp, layer):
    """[visual tokens, D]: a layer through an MLP, in transformers' order; newlines are 0."""
    other = with_projector(model, mlp).model
    if hasattr(other, "image_newline"):
        other.image_newline.data.zero_()
    pictures = {k: x for k, x in inputs.items() if k not in ("input_ids", "attention_mask")}
    found = other.get_image_features(**pictures, vision_feature_layer=[layer])
    return torch.cat(list(found.pooler_output))


def add_before(model, layer, features, inputs):
    """`features`: [visual tokens, D], or a function of the hidden states there."""
    places = inputs["input_ids"][0] == reference.IMAGE_TOKEN

    def hook(_, args):
        hidden = args[0].clone()
        added = features(hidden[0, places]) if callable(features) else features
        assert places.sum() == len(added)
        hidden[0, places] += added
        return hidden, *args[1:]

    model.model.language_model.layers[layer].register_forward_pre_hook(hook)


# ---- adapter -------------------------------------------------------------------------------------


class Ones(torch.nn.Module):
    """A projector that marks what it is given."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return torch.ones(*x.shape[:-1], self.width)


@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_llama"])
def test_adapter(name):
    """h + B A h at the patches of pictures: not at newlines, not at text."""
    points = (0, 2)

    def logits_of(inputs, own):
        model = copy.deepcopy(oracle.case(name).model)
        branches = zip(points, *(own["branch"][f"lora_{x}"] for x in "AB"), strict=True)
        for layer, A, B in branches if "pixel_values" in inputs else ():
            is_patch = packed(model, inputs, Ones(model.config.text_config.hidden_size), -1)
            add_before(model, layer, lambda h, A=A, B=B, ones=is_patch: ones * (h @ A @ B), inputs)
        return model(**inputs).logits[0].numpy()

    within(errors(name, AdapterConfig(inject=points, rank=3), logits_of))


# ---- mmfuser -------------------------------------------------------------------------------------


def deform(own, query, levels, heads, points):
    """MSDeformAttn with torch's grid_sample; query [B, N, V], levels L x [B, N, V]."""
    (B, N, V), L, side = query.shape, len(levels), math.isqrt(query.shape[1])
    offsets = linear(own["sampling_offsets"])(query).view(B, N, heads, L, points, 2)
    scores = linear(own["attention_weights"])(query).view(B, N, heads, L * points)
    weights = scores.softmax(-1).view(B, N, heads, L, points)
    centers = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], -1)[None, :, None, None, None]
    locations = places + offsets / side
    out = torch.zeros(B, heads, V // heads, N)
    for level, source in enumerate(levels):
        value = linear(own["value_proj"])(source).view(B, side, side, heads, V // heads)
        value = value.permute(0, 3, 4, 1, 2).flatten(0, 1)
        grid = (2 * locations[:, :, :, level] - 1).permute(0, 2, 1, 3, 4).flatten(0, 1)
        sampled = torch.nn.functional.grid_sample(
            value, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        ).view(B, heads, V // heads, N, points)
        out += (sampled * weights[:, :, :, level].permute(0, 2, 1, 3)[:, :, None]).sum(-1)
    return linear(own["output_proj"])(out.permute(0, 3, 1, 2).reshape(B, N, V))


class Fuser(torch.nn.Module):
    """MMFuser's block on concatenated layers, then the model's own projector."""

    def __init__(self, own, projector, layers, heads, points):
        super().__init__()
        self.own, self.projector, self.layers = own, projector, layers
        self.sizes = heads, points

    def forward(self, concatenated):
        *shallow, deep = concatenated.chunk(self.layers, dim=-1)

        def norm(name, x):
            own = self.own[name]
            return torch.nn.functional.layer_norm(
                x, x.shape[-1:], own["scale"], own["bias"], EPSILON
            )

        levels = [norm("feat_norm", x) for x in shallow]
        attn = deform(self.own["cross_attn"], norm("query_norm", deep), levels, *self.sizes)
        again = norm("norm1", attn)
        attn = attn + self.own["gamma2"] * deform(
            self.own["self_attn"], again, [again], *self.sizes
        )
        return self.projector(deep + self.own["gamma1"] * attn)


@pytest.mark.parametrize(
    ("name", "layers", "heads", "points"),
    [("siglip_qwen2", (0, 1, 3), 8, 3), ("clip_llama", (1, 4), 4, 4)],
)
def test_mmfuser(name, layers, heads, points):
    """Also where the deepest layer is not V_last (SigLIP), and with the tower's heads (CLIP)."""

    def logits_of(inputs, own):
        model = oracle.case(name).model
        projector = model.model.multi_modal_projector
        model = with_projector(model, Fuser(own, projector, len(layers), heads, points))
        return model(**inputs, vision_feature_layer=list(layers)).logits[0].numpy()

    config = MMFuserConfig(layers=layers, heads=0 if name == "clip_llama" else heads, points=points)
    within(errors(name, config, logits_of))


def test_samples_and_their_gradients_are_grid_samples():
    """Inside, across the border and far outside of the tile."""
    L, B, side, H, d, p = 2, 2, 5, 3, 4, 3
    N, rng = side**2, np.random.default_rng(0)
    value = rng.normal(size=(L, B, N, H, d)).astype(np.float32)
    offset = (3 * rng.normal(size=(B, N, H, L, p, 2))).astype(np.float32)
    weight = rng.uniform(size=(B, N, H, L, p)).astype(np.float32)
    pull = rng.normal(size=(B, N, H, d)).astype(np.float32)

    def theirs(value, offset, weight):
        place = torch.stack([torch.arange(N) % side, torch.arange(N) // side], -1)
        grid = (2 * (place[None, :, None, None, None] + offset) + 1) / side - 1
        total = 0
        for level in range(L):
            maps = value[level].view(B, side, side, H, d).permute(0, 3, 4, 1, 2).flatten(0, 1)
            at = grid[:, :, :, level].permute(0, 2, 1, 3, 4).flatten(0, 1)
            sampled = torch.nn.functional.grid_sample(maps, at, align_corners=False)
            own = weight[:, :, :, level].permute(0, 2, 1, 3)[:, :, None]
            total = total + (sampled.view(B, H, d, N, p) * own).sum(-1)
        return total.permute(0, 3, 1, 2)

    inputs = [torch.from_numpy(x).requires_grad_() for x in (value, offset, weight)]
    expected = theirs(*inputs)
    expected.backward(torch.from_numpy(pull))
    ours, vjp = jax.vjp(sample, value, offset, weight)
    np.testing.assert_allclose(ours, expected.detach().numpy(), rtol=0, atol=1e-5)
    for found, wanted in zip(vjp(pull), inputs, strict=True):
        np.testing.assert_allclose(found, wanted.grad.numpy(), rtol=0, atol=3e-5)
    outside = np.abs(offset).max() > side
    assert outside
    assert not np.asarray(sample(value, np.full_like(offset, side + 1.0), weight)).any()


def test_attention_starts_as_the_original():
    H, L, p, V = 8, 2, 3, 32
    attn = MSDeformAttn(H, p, np.float32, np.float32)
    query, levels = np.zeros((1, 4, V), np.float32), np.zeros((L, 1, 4, V), np.float32)
    start = nn.meta.unbox(attn.init(jax.random.key(0), query, levels))["params"]
    thetas = torch.arange(H, dtype=torch.float32) * (2.0 * math.pi / H)  # as in ms_deform_attn.py
    grid = torch.stack([thetas.cos(), thetas.sin()], -1)
    grid = (grid / grid.abs().max(-1, keepdim=True)[0]).view(H, 1, 1, 2).repeat(1, L, p, 1)
    for i in range(p):
        grid[:, :, i, :] *= i + 1
    np.testing.assert_allclose(start["sampling_offsets"]["bias"], grid.view(-1), atol=1e-5)
    for zero in ("sampling_offsets", "attention_weights"):
        assert not start[zero]["kernel"].any()
    for path in ("value_proj", "output_proj"):
        bound = math.sqrt(6 / (2 * V))  # Xavier's
        assert 0.9 * bound < np.abs(start[path]["kernel"]).max() <= bound
        assert not start[path]["bias"].any()
