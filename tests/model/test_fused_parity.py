"""`deepstack` and `dense_connector` in the whole model, against transformers with plain torch.

The reference's tower, projector, packing and decoder are transformers'. What a strategy adds is
written out in torch here: DeepStack adds projected patches by hooks before decoder layers,
DenseConnector joins hidden states before the projector.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

import torch

from cli_jax.config import ComputeConfig
from cli_jax.fusion.deepstack import DeepStackConfig
from cli_jax.fusion.dense_connector import DenseConnectorConfig
from cli_jax.image.preprocess import make_tiles, normalize
from cli_jax.model.vlm import build
from tests.model import oracle, reference
from tests.model.samples import IMAGE, batch_of

TILE, G, N = oracle.TILE, 4, 16
ROWS = (
    ("wide",),
    ("two_pictures",),
    ("no_picture", "tall", "three_pictures", "one_tile"),
    ("shrunk_and_cut", "no_picture", "odd_padding"),
)


def case_of(name, fusion):
    """The oracle's case with a strategy and, in both models, deeper decoder and wider projector."""
    return _case(name, type(fusion).__name__, fusion)


@functools.cache
def _case(name, kind, fusion):
    fusion_name = {"DeepStackConfig": "deepstack", "DenseConnectorConfig": "dense_connector"}[kind]
    plain = oracle.CONFIGS[name]
    config = dataclasses.replace(
        plain,
        text=dataclasses.replace(plain.text, num_hidden_layers=6),
        fusion_name=fusion_name,
        fusion=fusion,
    )
    model = reference.build(config)
    if fusion_name == "dense_connector" and fusion.variant != "sti":
        projector = model.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(3 * config.vision.hidden_size, config.text.hidden_size)
    reference.draw_parameters(model, 0, 1.0)
    params = reference.to_params(model.state_dict(), tied=config.text.tie_word_embeddings)
    return oracle.Case(config, model, params, oracle.case(name).prompts)


# ---- the reference ------------------------------------------------------------------------------


def states(right, tiles):
    """hidden_states of the tower without CLS, layer by layer [tiles, N, V]."""
    out = right.model.model.vision_tower(tiles, output_hidden_states=True)
    clip = right.config.vision.model_type == "clip"
    return [state[:, 1:] if clip else state for state in out.hidden_states]


def connected(right, hidden):
    """DenseConnector: what goes into the projector, and the pooled tokens behind it."""
    c, n = right.config.fusion, right.config.vision.num_hidden_layers
    last = hidden[right.config.vision.last_layer]
    if c.variant == "dci":
        first = torch.stack(hidden[: n // 2]).sum(0) / (n // 2)
        second = torch.stack(hidden[n // 2 : n]).sum(0) / (n - n // 2)
        return torch.cat([last, first, second], -1), None
    a, b = c.taps
    if c.variant == "sci":
        return torch.cat([last, hidden[a], hidden[b]], -1), None
    pool = torch.nn.AvgPool1d(8, 8)
    pooled = [pool(hidden[k].permute(0, 2, 1)).permute(0, 2, 1) for k in (a, b)]
    return last, torch.cat(pooled, 1)


def packed(right, features, image, single):
    """A picture's tokens as transformers packs them; `features` [tiles, N, D]."""
    model = right.model.model
    if right.config.vision.model_type == "clip":
        return features[0]
    features = features if single else features[:1]
    tokens, _ = model.pack_image_features(
        [features],
        torch.tensor([[image.height, image.width]]),
        model.image_newline,
        right.config.image.aspect_ratio,
    )
    return tokens[0]


def hires_tiles(right, image, single):
    """The tiles that DeepStack cuts for a picture of LLaVA-1.5, and their grid."""
    m, best, most, least = right.config.fusion.stacks, None, 0, np.inf
    for i in range(1, m + 1):
        for j in range(1, m // i + 1):
            w, h = i * TILE, j * TILE
            scale = min(w / image.width, h / image.height)
            kept = min(
                int(image.width * scale) * int(image.height * scale), image.width * image.height
            )
            if i * j > 1 and (kept > most or (kept == most and w * h - kept < least)):
                best, most, least = (i, j), kept, w * h - kept
    columns, rows = best
    canvas = np.asarray(image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC))
    cut = [
        canvas[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE]
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack(cut), (rows, columns)


def stacks(right, features, image, single):
    """DeepStack's S_k [K, N, D] from projected patches, K <= m; none without a grid."""
    c, anyres = right.config.fusion, right.config.vision.model_type == "siglip"
    if anyres and not single:
        return []
    if anyres:
        rows, columns = reference_grid(right, image)
        a = b = int(c.stacks**0.5)
    else:
        _, (rows, columns) = hires_tiles(right, image, single)
        a, b = rows, columns
    D = features.shape[-1]
    L = features[1:].view(rows, columns, G, G, D).permute(4, 0, 2, 1, 3)
    L = L.reshape(1, D, rows * G, columns * G)
    L = torch.nn.functional.interpolate(L, (a * G, b * G), mode="bilinear")[0].permute(1, 2, 0)
    return [L[i::a, j::b].reshape(N, D) for i in range(a) for j in range(b)]


def reference_grid(right, image):
    from transformers.models.llava_onevision import modeling_llava_onevision as hf

    pinpoints = [list(pair) for pair in right.config.image.grid_pinpoints]
    return hf.get_anyres_image_grid_shape([image.height, image.width], pinpoints, TILE)


def reference_logits(right, prompt):
    """Logits [L, vocab] of one prompt alone."""
    c, model = right.config, right.model.model
    deepstack = c.fusion_name == "deepstack"
    pieces, added, length = [], [], 0
    pictures = iter(prompt.pictures)
    for token in prompt.ids:
        if token != IMAGE:
            pieces.append(model.language_model.embed_tokens(torch.tensor([token])))
        else:
            image = next(pictures)
            tiles = make_tiles(image, c.image, c.vision, single=prompt.single)
            if deepstack and c.vision.model_type == "clip":
                tiles = np.concatenate([tiles, hires_tiles(right, image, True)[0]])
            tiles = torch.from_numpy(normalize(tiles, c.image).transpose(0, 3, 1, 2).copy())
            hidden = states(right, tiles)
            tokens, pooled = hidden[c.vision.last_layer], None
            if not deepstack:
                tokens, pooled = connected(right, hidden)
            features = model.multi_modal_projector(tokens)
            piece = packed(right, features, image, prompt.single)
            if deepstack:
                each = stacks(right, features, image, prompt.single)
                added += [(k, length, S) for k, S in enumerate(each)]
            if pooled is not None:  # of the base view, behind the last newline
                piece = torch.cat([piece, model.multi_modal_projector(pooled[0])])
            pieces.append(piece)
        length += len(pieces[-1])
    hooks = []
    for k, start, S in added:
        layer = model.language_model.layers[c.fusion.start + k * c.fusion.interval]

        def add(_, args, kwargs, start=start, S=S):
            h = args[0].clone()
            h[0, start : start + N] += S
            return (h, *args[1:]), kwargs

        hooks.append(layer.register_forward_pre_hook(add, with_kwargs=True))
    try:
        hidden = model.language_model(inputs_embeds=torch.cat(pieces)[None]).last_hidden_state
        return right.model.lm_head(hidden)[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()


@functools.cache
def expected(name, fusion, prompt):
    right = case_of(name, fusion)
    with torch.no_grad():
        return reference_logits(right, right.prompts[prompt])


# ---- the comparison -----------------------------------------------------------------------------

SCAN = ComputeConfig(dtype="float32", scan_layers=True, remat="full")
LOOP = ComputeConfig(dtype="float32", scan_layers=False, remat="none")
DEEPSTACK = DeepStackConfig()


def name_of(value):
    """Of a parameter, short."""
    if isinstance(value, ComputeConfig):
        return "scan" if value.scan_layers else "loop"
    if isinstance(value, DeepStackConfig):
        return "deepstack{}_{}_{}".format(*dataclasses.astuple(value))
    return value if isinstance(value, str) else value.variant


@pytest.mark.parametrize(
    ("name", "fusion", "compute"),
    [
        ("siglip_qwen2", DEEPSTACK, SCAN),
        ("siglip_qwen2", DEEPSTACK, LOOP),
        ("siglip_qwen2", DeepStackConfig(stacks=1, start=2), SCAN),
        ("clip_llama", DEEPSTACK, SCAN),
        ("clip_llama", DeepStackConfig(stacks=3, start=0, interval=2), LOOP),
        ("siglip_qwen2", DenseConnectorConfig("sti", taps=(1, 2)), SCAN),
        ("siglip_qwen2", DenseConnectorConfig("sci", taps=(0, 3)), SCAN),
        ("siglip_qwen2", DenseConnectorConfig("dci"), SCAN),
        ("siglip_qwen2", DenseConnectorConfig("dci"), LOOP),
        ("clip_llama", DenseConnectorConfig("sti", taps=(1, 3)), LOOP),
        ("clip_llama", DenseConnectorConfig("sci", taps=(1, 3)), SCAN),
        ("clip_llama", DenseConnectorConfig("dci"), SCAN),
    ],
    ids=name_of,
)
def test_logits_at_every_position(name, fusion, compute):
    right = case_of(name, fusion)
    batch, places = batch_of(ROWS, right.prompts, right.config, length=oracle.LENGTH)
    model = build(right.config, compute)
    ours = np.asarray(jax.jit(lambda *args: oracle.logits(model, *args))(right.params, batch))
    assert len(places) == 9
    errors = {p: oracle.error(p.of(ours), expected(name, fusion, p.name)) for p in places}
    assert {place: e for place, e in errors.items() if not e <= oracle.BOUND} == {}
