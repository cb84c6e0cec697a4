"""Hugging Face's config.json -> our configs, for every family of checkpoints that is read.

`llava_onevision` and `llava` (llava-hf), `llava` / `llava_qwen` / `llava_llama` as lmms-lab and
liuhaotian write them, and the separate towers and decoders: `siglip`, `clip`, `qwen2`, `llama`.
A setting the models here do not have is an error, never ignored: it would change the numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

from cli_jax.config import ImageConfig, TextConfig, VisionConfig
from cli_jax.hf.error import ConversionError

Json = Mapping[str, Any]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
ONEVISION_PINPOINTS = tuple((h * 384, w * 384) for h in range(1, 7) for w in range(1, 7))

SO400M = VisionConfig()
CLIP_LARGE_336 = VisionConfig("clip", 1024, 4096, 24, 16, 336, 14, "quick_gelu", 1e-5)
# Towers that a LLaVA config names without describing them.
_NAMED_TOWERS = {
    "siglip-so400m-patch14-384": SO400M,
    "clip-vit-large-patch14-336": CLIP_LARGE_336,
}
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "gelu": "gelu"}

# What a config.json may leave out: the library's own defaults.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "image_size": 224, "patch_size": 16},
        **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    },
    "clip": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "image_size": 224, "patch_size": 32},
        **{"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    },
}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {
        **{"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        **{"max_position_embeddings": 32_768},
    },
    "llama": {
        **{"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32},
        **{"max_position_embeddings": 2048},
    },
}
_TOKEN_KEYS = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")
_TEXT_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class HFConfig:
    """A LLaVA model's config.json. `vision` is None where only a file elsewhere describes it.

    tokens: special token ids as the source has them, by the source's keys.
    """

    vision: VisionConfig | None
    text: TextConfig
    image: ImageConfig
    has_newline: bool
    tokens: dict[str, Any]


def llava_config(config: Json, preprocessor: Json | None = None) -> HFConfig:
    """Reads the config.json of a whole model; `preprocessor` is its preprocessor_config.json."""
    model_type = config.get("model_type", "")
    if config.get("vision_config") or model_type == "llava_onevision":
        return _llava_hf(config, preprocessor or {})
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        return _llava_original(config, preprocessor or {})
    raise ConversionError(
        f"config.json describes a {model_type or 'nameless'!r} model, not a LLaVA model; to start"
        " from a separate vision tower and language model use `convert.py compose`"
    )


def vision_config(config: Json, *, layers: int | None = None) -> VisionConfig:
    """Reads a tower's config.json, alone or as one half of a two-tower model's.

    layers: how many to use. By default all for CLIP and all but the last for SigLIP, which is how
    LLaVA-OneVision was made (docs/method.md section 0: V_last).
    """
    if "vision_config" in config:  # two towers
        config = {"model_type": config.get("model_type", ""), **config["vision_config"]}
    vision = _vision(config)
    if layers is None:
        layers = vision.num_hidden_layers - (vision.model_type == "siglip")
    if not 0 < layers <= vision.num_hidden_layers:
        raise ConversionError(f"{layers} vision layers asked of {vision.num_hidden_layers}")
    return dataclasses.replace(vision, num_hidden_layers=layers)


def text_config(config: Json) -> TextConfig:
    """Reads a decoder's config.json (`qwen2` or `llama`)."""
    model_type = config.get("model_type", "")
    if model_type not in _TEXT_DEFAULTS:
        raise ConversionError(f"language models of type {model_type!r} are not supported")
    values = {**_TEXT_DEFAULTS[model_type], **_given(config)}
    wrong = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "attention_bias": model_type == "llama" and values.get("attention_bias", False),
        "mlp_bias": values.get("mlp_bias", False),
        "use_sliding_window": values.get("use_sliding_window", False),
    }
    _refuse(values, wrong)
    heads = values["num_attention_heads"]
    return TextConfig(
        model_type=cast(Any, model_type),
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", values["hidden_size"] // heads),
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_position_embeddings=values["max_position_embeddings"],
        initializer_range=float(values.get("initializer_range", 0.02)),
    )


def differences(found: VisionConfig | TextConfig, wanted: VisionConfig | TextConfig) -> list[str]:
    """Fields in which a checkpoint's config and the model's differ, as lines of text.

    Left out: the vocabulary size, which may be padded, and what does not enter the computation.
    """
    skip = {"vocab_size", "max_position_embeddings", "initializer_range"}
    return [
        f"{f.name}: checkpoint {getattr(found, f.name)!r}, model {getattr(wanted, f.name)!r}"
        for f in dataclasses.fields(found)
        if f.name not in skip and getattr(found, f.name) != getattr(wanted, f.name)
    ]


def _llava_hf(config: Json, preprocessor: Json) -> HFConfig:
    onevision = config.get("model_type") == "llava_onevision"
    wrong = {
        "projector_hidden_act": config.get("projector_hidden_act", "gelu") != "gelu",
        "multimodal_projector_bias": not config.get("multimodal_projector_bias", True),
    }
    _refuse(config, wrong)
    # a description that is there is completed by its own type's defaults, not by LLaVA's tower
    tower = config.get("vision_config")
    vision = _vision(tower) if tower else SO400M if onevision else CLIP_LARGE_336
    vision = _used_layers(
        vision,
        config.get("vision_feature_layer", -1 if onevision else -2),
        config.get("vision_feature_select_strategy", "full" if onevision else "default"),
    )
    text_json = {"model_type": "qwen2" if onevision else "llama", **config.get("text_config", {})}
    text = text_config(text_json)
    tied = text.tie_word_embeddings or bool(config.get("tie_word_embeddings", False))
    if onevision:
        pinpoints = config.get("image_grid_pinpoints") or ONEVISION_PINPOINTS
        image = _image(
            vision,
            preprocessor,
            aspect_ratio=config.get("vision_aspect_ratio", "anyres_max_9"),
            grid_pinpoints=tuple((h, w) for h, w in pinpoints),
        )
    else:
        aspect = _single_tile_aspect(preprocessor)
        image = _image(vision, preprocessor, aspect_ratio=aspect, multi_image="same")
    return HFConfig(
        vision,
        dataclasses.replace(text, tie_word_embeddings=tied),
        image,
        has_newline=onevision,
        tokens=_tokens(config, text_json),
    )


def _llava_original(config: Json, preprocessor: Json) -> HFConfig:
    wrong = {
        "mm_projector_type": config.get("mm_projector_type", "linear") != "mlp2x_gelu",
        "mm_vision_select_feature": config.get("mm_vision_select_feature", "patch") != "patch",
    }
    _refuse(config, wrong)
    architecture = f"{config.get('model_type')} {config.get('architectures')}".lower()
    text = text_config({**config, "model_type": "qwen2" if "qwen" in architecture else "llama"})
    tower = str(config.get("mm_vision_tower", ""))
    vision = next((v for key, v in _NAMED_TOWERS.items() if key in tower), None)
    # For SigLIP, LLaVA-NeXT deletes the last layer and takes the new last one, whatever
    # mm_vision_select_layer says; for CLIP only the reference's choice is built.
    if "siglip" not in tower.lower():
        wrong = {"mm_vision_select_layer": config.get("mm_vision_select_layer", -2) != -2}
        _refuse(config, wrong)
    aspect = config.get("image_aspect_ratio") or "square"
    anyres = aspect.startswith("anyres")
    if aspect == "square" and "siglip" not in tower.lower():
        aspect = "crop"  # what LLaVA-1.5 calls `square` resizes the short side and crops
    image = _image(
        vision or (SO400M if "siglip" in tower.lower() else CLIP_LARGE_336),
        preprocessor,
        aspect_ratio=aspect,
        multi_image="pad_newline" if anyres else "same",
        grid_pinpoints=_pinpoints(config.get("image_grid_pinpoints")) if anyres else (),
        rounding="original",
    )
    newline = "unpad" in (config.get("mm_patch_merge_type") or "flat")
    return HFConfig(vision, text, image, newline, _tokens(config, config))


def _vision(values: Json) -> VisionConfig:
    family = next((f for f in ("siglip", "clip") if values.get("model_type", "").startswith(f)), "")
    if family not in _VISION_DEFAULTS:
        raise ConversionError(
            f"vision towers of type {values.get('model_type')!r} are not supported"
        )
    values = {**_VISION_DEFAULTS[family], **_given(values)}
    _refuse(values, {"hidden_act": values["hidden_act"] not in _ACTIVATIONS})
    fields = {f.name: values[f.name] for f in dataclasses.fields(VisionConfig) if f.name in values}
    fields |= {"model_type": family, "hidden_act": _ACTIVATIONS[values["hidden_act"]]}
    fields["layer_norm_eps"] = float(fields["layer_norm_eps"])
    return VisionConfig(**fields)


def _used_layers(vision: VisionConfig, feature_layer: Any, strategy: str) -> VisionConfig:
    """Cuts the tower behind the layer that feeds the projector, so that it is V_last."""
    clip = vision.model_type == "clip"
    if not isinstance(feature_layer, int):
        raise ConversionError(
            f"vision_feature_layer {feature_layer}: only one layer feeds the projector here"
        )
    if strategy != ("default" if clip else "full"):
        raise ConversionError(
            f"vision_feature_select_strategy {strategy!r} is not supported for {vision.model_type}"
        )
    n = vision.num_hidden_layers
    index = feature_layer + n + 1 if feature_layer < 0 else feature_layer
    layers = index + clip
    if not 0 < layers <= n:
        raise ConversionError(
            f"vision_feature_layer {feature_layer} of a {vision.model_type} tower with {n} layers"
            " is not supported"
        )
    return dataclasses.replace(vision, num_hidden_layers=layers)


def _image(vision: VisionConfig, preprocessor: Json, **fields: Any) -> ImageConfig:
    clip = vision.model_type == "clip"
    mean = preprocessor.get("image_mean") or (CLIP_MEAN if clip else SIGLIP_MEAN)
    std = preprocessor.get("image_std") or (CLIP_STD if clip else SIGLIP_STD)
    return ImageConfig(image_mean=tuple(mean), image_std=tuple(std), **fields)


def _single_tile_aspect(preprocessor: Json) -> str:
    """How LlavaImageProcessor makes its one tile; `pad`, LLaVA-1.5's own, where it does not say.

    The llava-hf repositories of LLaVA-1.5 name CLIP's processor, which crops; that is their
    deviation from how the model was trained.
    """
    if preprocessor.get("do_pad", True):
        return "pad"
    return "crop" if preprocessor.get("do_center_crop", True) else "square"


def _pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
    """The original's (width, height) pairs, or its "(1x1),...,(6x6)" of 384-pixel tiles."""
    if isinstance(value, str):
        numbers = [int(n) for n in re.findall(r"\d+", value)]
        if len(numbers) != 4:
            raise ConversionError(f"image_grid_pinpoints {value!r} is not understood")
        w0, h0, w1, h1 = numbers
        return tuple((h * 384, w * 384) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1))
    return tuple((h, w) for w, h in value or ())


def _rope_theta(values: Json) -> float:
    # `rope_scaling` up to transformers 4, `rope_parameters` since 5
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConversionError(f"rotary positions of type {kind!r} are not supported")
    return float({"rope_theta": 10_000.0, **values, **rope}["rope_theta"])


def _tokens(config: Json, text: Json) -> dict[str, Any]:
    tokens = {k: config[k] for k in _TOKEN_KEYS if config.get(k) is not None}
    return tokens | {k: text[k] for k in _TEXT_TOKEN_KEYS if text.get(k) is not None}


def _given(values: Json) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _refuse(values: Json, wrong: Mapping[str, bool]) -> None:
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ConversionError(f"config.json has {key}={values.get(key)!r}: not supported here")
