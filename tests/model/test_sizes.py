"""Full-size models, by shape only: parameter counts, and every tensor against transformers'."""

import dataclasses
import math

import flax.linen as nn
import jax
import pytest
from flax.traverse_util import flatten_dict

from cli_jax.batch import empty
from cli_jax.config import ComputeConfig, ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion.cli import CLIConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.model.vlm import build

SIGLIP = VisionConfig()
CLIP = VisionConfig(
    model_type="clip",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
QWEN2_0P5B = TextConfig()
QWEN2_7B = TextConfig(
    vocab_size=152_128,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    tie_word_embeddings=False,
)
VICUNA_7B = TextConfig(
    model_type="llama",
    vocab_size=32_064,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
)
MOBILE_1P4B = dataclasses.replace(
    VICUNA_7B,
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
)
MOBILE_2P7B = dataclasses.replace(
    MOBILE_1P4B,
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=80,
)


def model_config(vision, text, fusion=None):
    anyres = tuple((h, w) for h in range(384, 2305, 384) for w in range(384, 2305, 384))
    siglip = vision.model_type == "siglip"
    return ModelConfig(
        vision=vision,
        text=text,
        image=ImageConfig(grid_pinpoints=anyres) if siglip else ImageConfig(aspect_ratio="pad"),
        fusion_name="cli" if fusion else "none",
        fusion=fusion or NoneConfig(),
        has_newline=siglip,
    )


def shapes(config):
    """Path -> shape of every parameter; nothing is allocated."""
    v = config.vision
    batch = empty(
        rows=1, length=8, visual=4, tiles=1, images=1, tile_size=v.image_size, patches=v.num_patches
    )
    model = build(config, ComputeConfig())
    params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), batch)["params"]))
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def count(shapes, prefix=""):
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefix))


# Counts of the published checkpoints in Hugging Face's vocabularies. MobileLLaMA's own are those of
# the language model; tower and projector come on top.
DECODER = ("language_model/", "lm_head/")
MODELS = {
    "llava-onevision-qwen2-0.5b": (SIGLIP, QWEN2_0P5B, "", 893_675_552),
    "llava-onevision-qwen2-7b": (SIGLIP, QWEN2_7B, "", 8_030_807_584),
    "llava-1.5-7b": (CLIP, VICUNA_7B, "", 7_063_427_072),
    "mobilellama-1.4b": (CLIP, MOBILE_1P4B, DECODER, 1_364_297_728),
    "mobilellama-2.7b": (CLIP, MOBILE_2P7B, DECODER, 2_701_560_320),
}


@pytest.mark.parametrize(("vision", "text", "prefix", "expected"), MODELS.values(), ids=MODELS)
def test_full_size_parameter_counts(vision, text, prefix, expected):
    assert count(shapes(model_config(vision, text)), prefix) == expected


def test_parts_of_the_half_billion_model():
    parts = shapes(model_config(SIGLIP, QWEN2_0P5B))
    assert count(parts, "vision_tower/") == 397_747_744
    assert count(parts, ("language_model/layers/", "language_model/norm/")) == 357_898_112
    assert count(parts, "language_model/embed_tokens/") == 136_192_000
    assert count(parts, "multi_modal_projector/") == 1_836_800
    assert count(parts, "lm_head/") == 0  # tied: the embedding is counted once


@pytest.mark.parametrize(("vision", "text"), [m[:2] for m in MODELS.values()], ids=MODELS)
def test_every_tensor_has_the_references_name_and_shape(vision, text):
    torch = pytest.importorskip("torch")
    from tests.model import reference

    config = model_config(vision, text)
    with torch.device("meta"):
        state = reference.build(config).state_dict()
    expected = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and text.tie_word_embeddings:
            continue
        path, layer, axes = reference.our_name(name, tensor.ndim)
        layers = vision if path[0] == "vision_tower" else text
        stacked = () if layer is None else (layers.num_hidden_layers,)
        expected["/".join(path)] = (*stacked, *(tensor.shape[axis] for axis in axes))
    assert shapes(config) == expected


def test_new_parameters_of_the_7b_configuration():
    """CLI's own parameters, counted from docs/method.md section 1 and not from the modules."""
    V, D = SIGLIP.hidden_size, QWEN2_7B.hidden_size
    K, T, r = 9, 10, 64  # vision layers 26, 23, ..., 2; decoder layers 0, 3, ..., 27
    amp = K * (r * V + D * r)  # A_k: r x V, B_k: D x r
    agf = T * (2 * D + 2 * D + 1)  # two queries, w over [c_v ; c_h], b; shared over k
    assert (amp, agf) == (2_727_936, 143_370)

    base = shapes(model_config(SIGLIP, QWEN2_7B))
    cli = shapes(model_config(SIGLIP, QWEN2_7B, CLIConfig()))
    new = {path: shape for path, shape in cli.items() if path.startswith("fusion/")}
    assert {path: shape for path, shape in cli.items() if path not in new} == base
    assert count(new, "fusion/amp/") == amp
    assert count(new, "fusion/agf/") == agf
    assert count(cli) == 8_030_807_584 + 2_871_306


@pytest.mark.parametrize(
    ("fusion", "per_point"),
    [
        (CLIConfig(per_pair=True), lambda D, K: 2 * D + K * (2 * D + 1)),
        (CLIConfig(gate="channel"), lambda D, K: 2 * D + (2 * D * 64 + 64 * D) + D),
        (CLIConfig(agf="mean"), lambda D, K: 0),
        (CLIConfig(agf="one"), lambda D, K: 0),
    ],
    ids=["per_pair", "channel", "mean", "one"],
)
def test_new_parameters_of_the_variants(fusion, per_point):
    new = shapes(model_config(SIGLIP, QWEN2_7B, fusion))
    assert count(new, "fusion/amp/") == 9 * 64 * (1152 + 3584)
    assert count(new, "fusion/agf/") == 10 * per_point(3584, 9)


def test_no_lora_branch_without_amp():
    assert count(shapes(model_config(SIGLIP, QWEN2_7B, CLIConfig(amp=False))), "fusion/amp/") == 0
