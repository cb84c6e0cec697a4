"""config.json in all its forms -> our configs, and back."""

import dataclasses

import pytest
from hf_models import CLIP, LLAMA, PINPOINTS, QWEN, SIGLIP, hub_config, original_config

from cli_jax.config import ImageConfig, TextConfig, VisionConfig
from cli_jax.hf.config import (
    CLIP_LARGE_336,
    CLIP_MEAN,
    ONEVISION_PINPOINTS,
    differences,
    llava_config,
    text_config,
    vision_config,
)
from cli_jax.hf.config_out import check_image_token, config_json, image_token, preprocessor_json
from cli_jax.hf.error import ConversionError

# As in the published files, shortened to what a reader may rely on.
OV_7B = {
    "model_type": "llava_onevision",
    "text_config": {
        **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944},
        **{"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
        **{"rope_theta": 1000000.0, "vocab_size": 152128, "max_position_embeddings": 32768},
    },
}
LLAVA_15 = {
    "model_type": "llava",
    "text_config": {
        **{"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
        **{"vocab_size": 32064},
    },
    "vision_config": {
        **{"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336},
        **{"intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
        **{"patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
    },
}


def test_defaults_of_the_library_fill_a_short_onevision_config():
    config = llava_config(OV_7B)
    assert config.vision == VisionConfig()
    assert config.text == TextConfig(
        "qwen2", 152_128, 3584, 18_944, 28, 28, 4, 128, 1e-6, 1e6, False, 32_768
    )
    assert config.image == ImageConfig("anyres_max_9", grid_pinpoints=ONEVISION_PINPOINTS)
    assert config.has_newline


def test_defaults_of_the_library_fill_a_short_llava15_config():
    config = llava_config(LLAVA_15)
    assert config.vision == CLIP_LARGE_336
    assert config.text == TextConfig(
        "llama", 32_064, 4096, 11_008, 32, 32, 32, 128, 1e-5, 1e4, False, 4096
    )
    assert (config.image.aspect_ratio, config.image.image_mean) == ("pad", CLIP_MEAN)
    assert not config.has_newline


def test_tied_in_either_place_is_tied():
    assert llava_config(OV_7B | {"tie_word_embeddings": True}).text.tie_word_embeddings
    text = OV_7B["text_config"] | {"tie_word_embeddings": True}
    assert llava_config(OV_7B | {"text_config": text}).text.tie_word_embeddings


def test_rope_in_old_and_new_spelling():
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert text_config({"model_type": "llama", **new}).rope_theta == 5e5
    assert text_config({"model_type": "llama", "rope_theta": 7e3}).rope_theta == 7e3
    assert text_config({"model_type": "llama", "rope_scaling": None}).rope_theta == 1e4


def test_original_onevision():
    config = llava_config(original_config(QWEN, "google/siglip-so400m-patch14-384"))
    assert config.vision == VisionConfig()
    assert config.text == QWEN
    # LLaVA-NeXT's pairs are (width, height), ours (height, width); the order is kept
    assert config.image == ImageConfig(
        "anyres_max_9", "pad_newline", ((28, 28), (28, 56), (56, 28)), "original"
    )
    assert config.has_newline


def test_original_pinpoints_as_a_range():
    config = original_config(
        QWEN, "siglip-so400m-patch14-384", image_grid_pinpoints="(1x1),...,(6x6)"
    )
    assert set(llava_config(config).image.grid_pinpoints) == set(ONEVISION_PINPOINTS)


def test_original_llava15():
    config = llava_config(original_config(LLAMA, "openai/clip-vit-large-patch14-336"))
    assert (config.vision, config.text) == (CLIP_LARGE_336, LLAMA)
    assert (config.image.aspect_ratio, config.image.multi_image) == ("pad", "same")
    assert not config.has_newline
    stage1 = original_config(LLAMA, "clip-vit-large-patch14-336", image_aspect_ratio="square")
    assert llava_config(stage1).image.aspect_ratio == "crop"


def test_towers():
    siglip = {"model_type": "siglip", "vision_config": {"num_hidden_layers": 27, "hidden_size": 48}}
    assert vision_config(siglip).num_hidden_layers == 26
    assert vision_config(siglip, layers=27).num_hidden_layers == 27
    assert vision_config(siglip).hidden_act == "gelu_tanh"
    clip = vision_config({"model_type": "clip_vision_model", "num_hidden_layers": 5})
    assert (clip.num_hidden_layers, clip.hidden_act, clip.layer_norm_eps) == (5, "quick_gelu", 1e-5)
    with pytest.raises(ConversionError, match="28 vision layers asked of 27"):
        vision_config(siglip, layers=28)


REFUSED = [
    ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
    ({"vision_feature_layer": [-2, -5]}, "only one layer"),
    ({"vision_feature_select_strategy": "default"}, "not supported for siglip"),
    ({"vision_feature_layer": 0}, "vision_feature_layer 0"),
    ({"model_type": "paligemma", "vision_config": None}, "not a LLaVA model"),
    ({"vision_config": {"model_type": "vit"}}, "vision towers of type 'vit'"),
    ({"text_config": {"model_type": "gemma"}}, "language models of type 'gemma'"),
    (
        {"text_config": {"model_type": "llama", "rope_scaling": {"type": "linear"}}},
        "rotary positions of type 'linear'",
    ),
    ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias=True"),
    ({"text_config": {"model_type": "llama", "mlp_bias": True}}, "mlp_bias=True"),
    ({"text_config": {"model_type": "qwen2", "use_sliding_window": True}}, "use_sliding_window"),
    ({"text_config": {"model_type": "qwen2", "hidden_act": "gelu"}}, "hidden_act='gelu'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_the_models_cannot_do_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        llava_config(hub_config(SIGLIP, QWEN) | change)


def test_original_clip_layer_is_checked():
    config = original_config(LLAMA, "clip-vit-large-patch14-336", mm_vision_select_layer=-1)
    with pytest.raises(ConversionError, match="mm_vision_select_layer=-1"):
        llava_config(config)


@pytest.mark.parametrize(("vision", "text"), [(SIGLIP, QWEN), (CLIP, LLAMA), (SIGLIP, LLAMA)])
def test_written_config_reads_back(vision, text):
    siglip = vision.model_type == "siglip"
    image = ImageConfig("anyres_max_4", grid_pinpoints=PINPOINTS, image_mean=(0.1, 0.2, 0.3))
    if not siglip:
        image = ImageConfig("pad", "same", image_mean=(0.1, 0.2, 0.3))
    written = config_json(
        vision, text, image, has_newline=siglip, dtype="float32", tokens={"eos_token_id": 7}
    )
    preprocessor = preprocessor_json(vision, image)
    config = llava_config(written, preprocessor)
    assert (config.vision, config.text, config.image) == (vision, text, image)
    assert config.has_newline == siglip
    assert config.tokens["eos_token_id"] == 7


def test_anyres_without_a_maximum_gets_one_that_never_binds():
    image = ImageConfig("anyres", grid_pinpoints=((56, 28), (56, 84)))
    written = config_json(SIGLIP, QWEN, image, has_newline=True, dtype="float32", tokens={})
    assert written["vision_aspect_ratio"] == "anyres_max_6"


def test_anyres_without_newline_has_no_class():
    image = ImageConfig("anyres_max_4", grid_pinpoints=PINPOINTS)
    with pytest.raises(ConversionError, match="no image_newline"):
        config_json(SIGLIP, QWEN, image, has_newline=False, dtype="float32", tokens={})


def test_image_token_needs_a_row():
    image = ImageConfig("anyres_max_4", grid_pinpoints=PINPOINTS)
    written = config_json(SIGLIP, QWEN, image, has_newline=True, dtype="float32", tokens={})
    assert written["image_token_index"] == 151_646
    with pytest.raises(ConversionError, match="--vocab_size 128"):
        check_image_token(written)
    good = {"image_token_index": 95}
    check_image_token(
        config_json(SIGLIP, QWEN, image, has_newline=True, dtype="float32", tokens=good)
    )


def test_image_token_is_the_first_row_that_a_small_vocabulary_gets():
    assert image_token({}, QWEN, None) == 151_646
    assert image_token({}, QWEN, 80) == 80
    assert image_token({"image_token_index": 7}, QWEN, 80) == 7
    assert image_token({}, dataclasses.replace(LLAMA, vocab_size=32_064), 32_000) == 32_000
    assert image_token({}, dataclasses.replace(QWEN, vocab_size=152_000), 151_936) == 151_646


@pytest.mark.parametrize("aspect", ["pad", "crop", "square"])
def test_one_tile_per_picture_is_read_back_as_it_was_written(aspect):
    image = ImageConfig(aspect, "same")
    written = config_json(CLIP, LLAMA, image, has_newline=False, dtype="float32", tokens={})
    assert written["model_type"] == "llava"
    assert llava_config(written, preprocessor_json(CLIP, image)).image == image


def test_clip_s_processor_beside_llava15_does_not_change_how_it_was_trained():
    clip = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True}
    assert llava_config(LLAVA_15, clip).image.aspect_ratio == "pad"


def test_differences_name_what_changes_the_numbers():
    assert differences(SIGLIP, SIGLIP) == []
    other = VisionConfig("siglip", 24, 40, 2, 4, 28, 8, "gelu", 1e-6)
    assert differences(SIGLIP, other) == [
        "num_attention_heads: checkpoint 2, model 4",
        "hidden_act: checkpoint 'gelu_tanh', model 'gelu'",
    ]
    longer = TextConfig("qwen2", 200, 32, 48, 2, 4, 2, 8, 1e-6, 1e5, True, 1024)
    assert differences(QWEN, longer) == ["rope_theta: checkpoint 1000000.0, model 100000.0"]
