"""Our configs -> a config.json and a preprocessor_config.json that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cli_jax.config import ImageConfig, TextConfig, VisionConfig
from cli_jax.hf.error import ConversionError

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}
# The ids llava-hf gives `<image>`: the first that the text tokenizer leaves free.
IMAGE_TOKEN = {"qwen2": 151_646, "llama": 32_000}


def config_json(
    vision: VisionConfig,
    text: TextConfig,
    image: ImageConfig,
    *,
    has_newline: bool,
    dtype: str,
    tokens: Mapping[str, Any],
    appended_from: int | None = None,
) -> dict[str, Any]:
    """The config of `LlavaOnevisionForConditionalGeneration` for any-resolution pictures, and of
    `LlavaForConditionalGeneration` for those that are one tile.

    tokens: special token ids to keep (`hf.config.HFConfig.tokens`). appended_from: the first
    vocabulary row that the conversion added.
    """
    clip = vision.model_type == "clip"
    image_id = image_token(tokens, text, appended_from)
    config: dict[str, Any] = {
        "image_token_index": image_id,
        "vision_config": _vision_json(vision),
        "text_config": _text_json(text, tokens),
        "tie_word_embeddings": text.tie_word_embeddings,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2 if clip else -1,
        "vision_feature_select_strategy": "default" if clip else "full",
        "torch_dtype": dtype,
    }
    if is_onevision(image):
        if not has_newline:
            raise ConversionError(
                f"transformers has no LLaVA with {image.aspect_ratio} pictures and no image_newline"
            )
        video_token = tokens.get("video_token_index", tokens.get("video_token_id"))
        config |= {
            "model_type": "llava_onevision",
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "vision_aspect_ratio": _aspect_ratio(image, vision),
            "image_grid_pinpoints": [list(p) for p in image.grid_pinpoints]
            or [[vision.image_size, vision.image_size]],
            "video_token_index": image_id + 1 if video_token is None else video_token,
        }
    else:
        config |= {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_seq_length": vision.num_patches,
        }
    return config


def is_onevision(image: ImageConfig) -> bool:
    """Whether pictures become tiles; transformers has that in LLaVA-OneVision only."""
    return image.aspect_ratio.startswith("anyres")


def image_token(tokens: Mapping[str, Any], text: TextConfig, appended_from: int | None) -> int:
    """The `<image>` id: the source's, else llava-hf's, else the first appended row."""
    known = tokens.get("image_token_index", tokens.get("image_token_id"))
    if known is not None:
        return known
    usual = IMAGE_TOKEN[text.model_type]
    return usual if usual < text.vocab_size or appended_from is None else appended_from


def check_image_token(config: Mapping[str, Any]) -> None:
    """Refuses an `<image>` id without an embedding row: transformers looks it up."""
    token, rows = config["image_token_index"], config["text_config"]["vocab_size"]
    if not 0 <= token < rows:
        raise ConversionError(
            f"the <image> id {token} has no row in a vocabulary of {rows}, and transformers looks"
            f" it up: give --vocab_size {-(-(rows + 2) // 64) * 64}, which appends rows and takes"
            " the first for <image>, or --image_token_id with an id that prompts never contain"
        )


def preprocessor_json(vision: VisionConfig, image: ImageConfig) -> dict[str, Any]:
    """The matching preprocessor_config.json: the picture is treated as in training."""
    size = vision.image_size
    config: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
    }
    if is_onevision(image):
        return config | {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [list(p) for p in image.grid_pinpoints] or [[size, size]],
            "size": {"height": size, "width": size},
        }
    crop = image.aspect_ratio == "crop"
    return config | {
        "image_processor_type": "LlavaImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": crop,
        "do_pad": image.aspect_ratio == "pad",
        "size": {"shortest_edge": size} if crop else {"height": size, "width": size},
    }


def _aspect_ratio(image: ImageConfig, vision: VisionConfig) -> str:
    """transformers needs a maximum: `anyres` gets one that the largest grid does not exceed."""
    if image.aspect_ratio.startswith("anyres_max_"):
        return image.aspect_ratio
    tiles = [h * w // vision.image_size**2 for h, w in image.grid_pinpoints]
    return f"anyres_max_{max(tiles, default=9)}"


def _vision_json(vision: VisionConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": f"{vision.model_type}_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": _ACTIVATIONS[vision.hidden_act],
        "layer_norm_eps": vision.layer_norm_eps,
    }
    return config | ({"vision_use_head": False} if vision.model_type == "siglip" else {})


def _text_json(text: TextConfig, tokens: Mapping[str, Any]) -> dict[str, Any]:
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[text.model_type]
    config: dict[str, Any] = {
        "model_type": text.model_type,
        "architectures": [architecture],
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "max_position_embeddings": text.max_position_embeddings,
        "initializer_range": text.initializer_range,
    }
    if text.model_type == "qwen2":
        config["use_sliding_window"] = False
    keep = ("bos_token_id", "eos_token_id", "pad_token_id")
    return config | {key: tokens[key] for key in keep if key in tokens}
