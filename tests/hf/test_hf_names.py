"""The name map: published names by hand, and our model's own parameters."""
# ruff: noqa: E501 (names are long)

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_models import (
    CLIP,
    LAYOUTS,
    LLAMA,
    QWEN,
    QWEN_UNTIED,
    SIGLIP,
    abstract_params,
    model_config,
    stored,
    weights,
)

from cli_jax.config import TextConfig, VisionConfig
from cli_jax.hf import names
from cli_jax.hf.config import CLIP_LARGE_336

PAIRS = [(SIGLIP, QWEN), (SIGLIP, QWEN_UNTIED), (CLIP, LLAMA), (CLIP, QWEN), (SIGLIP, LLAMA)]

EXAMPLES = {
    # llava-hf, four namings
    "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias": "vision_tower.encoder.layers.3.mlp.fc1.bias",
    "model.vision_tower.vision_model.post_layernorm.weight": "vision_tower.post_layernorm.weight",
    "model.vision_tower.embeddings.patch_embedding.bias": "vision_tower.embeddings.patch_embedding.bias",
    "vision_tower.pre_layrnorm.bias": "vision_tower.pre_layrnorm.bias",
    "language_model.model.layers.0.self_attn.q_proj.bias": "language_model.layers.0.self_attn.q_proj.bias",
    "model.language_model.norm.weight": "language_model.norm.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
    "model.image_newline": "image_newline",
    "image_newline": "image_newline",
    "model.multi_modal_projector.linear_2.weight": "multi_modal_projector.linear_2.weight",
    # lmms-lab, liuhaotian, and a stage-1 projector
    "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight": "vision_tower.embeddings.position_embedding.weight",
    "model.mm_projector.0.weight": "multi_modal_projector.linear_1.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
    "mm_projector.0.bias": "multi_modal_projector.linear_1.bias",
    "model.embed_tokens.weight": "language_model.embed_tokens.weight",
    "model.layers.11.mlp.down_proj.weight": "language_model.layers.11.mlp.down_proj.weight",
    "model.norm.weight": "language_model.norm.weight",
    # buffers of old files
    "vision_tower.vision_model.embeddings.position_ids": None,
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": None,
    "model.layers.0.self_attn.rotary_emb.inv_freq": None,
}

TOWERS = {
    "vision_model.encoder.layers.26.layer_norm1.bias": "vision_tower.encoder.layers.26.layer_norm1.bias",
    "embeddings.class_embedding": "vision_tower.embeddings.class_embedding",
    "pre_layrnorm.weight": "vision_tower.pre_layrnorm.weight",
    "vision_tower.vision_tower.vision_model.post_layernorm.bias": "vision_tower.post_layernorm.bias",
    "vision_model.head.probe": None,
    "vision_model.head.attention.in_proj_weight": None,
    "head.mlp.fc1.weight": None,
    "text_model.encoder.layers.0.mlp.fc1.weight": None,
    "logit_scale": None,
    "logit_bias": None,
    "visual_projection.weight": None,
    "text_projection.weight": None,
    "vision_model.embeddings.position_ids": None,
}


@pytest.mark.parametrize("stored_name", EXAMPLES)
def test_published_names(stored_name):
    assert names.canonical(stored_name) == EXAMPLES[stored_name]


@pytest.mark.parametrize("stored_name", TOWERS)
def test_names_of_a_tower_by_itself(stored_name):
    assert names.canonical(stored_name, tower=True) == TOWERS[stored_name]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("vision", "text"), PAIRS)
def test_every_layout_is_undone_and_the_hub_layout_is_written(layout, vision, text):
    tensors = weights(vision, text, newline=vision.model_type == "siglip")
    on_disk = stored(tensors, layout)
    assert [names.canonical(name) for name in on_disk] == list(tensors)
    assert [names.hub(name) for name in tensors] == list(stored(tensors, "hub"))


@pytest.mark.parametrize(("vision", "text"), PAIRS)
@pytest.mark.parametrize("fusion", ["none", "cli"])
def test_leaves_are_the_parameters_of_the_model(vision, text, fusion):
    config = model_config(vision, text, fusion)
    found = {p: x.shape for p, x in flatten_dict(abstract_params(config), sep="/").items()}
    shapes = names.expected(vision, text, has_newline=config.has_newline)
    leaves = names.leaves(shapes)
    own = {path for path in found if path.startswith("fusion/")}
    assert {p: leaf.shape for p, leaf in leaves.items()} == {
        p: s for p, s in found.items() if p not in own
    }
    assert bool(own) == (fusion == "cli")
    assert sorted(n for leaf in leaves.values() for n in leaf.names) == sorted(shapes)


def test_published_parameter_counts():
    """LLaVA-OneVision 0.5B and 7B, LLaVA-1.5-7B, with the vocabularies of llava-hf."""
    ov7b = TextConfig("qwen2", 152_128, 3584, 18_944, 28, 28, 4, 128, tie_word_embeddings=False)
    vicuna = TextConfig("llama", 32_064, 4096, 11_008, 32, 32, 32, 128, 1e-5, 1e4, False, 4096)
    for vision, text, newline, count in (
        (VisionConfig(), TextConfig(), True, 893_675_552),
        (VisionConfig(), ov7b, True, 8_030_807_584),
        (CLIP_LARGE_336, vicuna, False, 7_063_427_072),
    ):
        shapes = names.expected(vision, text, has_newline=newline)
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
