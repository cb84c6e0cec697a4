"""Tiny checkpoints in every known naming, written with the safetensors library, without torch."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from cli_jax import batch as batch_lib
from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.experiment import ComputeConfig
from cli_jax.fusion import registry
from cli_jax.hf import names
from cli_jax.model import vlm

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

SIGLIP = VisionConfig("siglip", 24, 40, 2, 2, 28, 8, "gelu_tanh", 1e-6)  # 28 = 3 * 8 + 4
CLIP = VisionConfig("clip", 24, 40, 3, 2, 24, 8, "quick_gelu", 1e-5)
QWEN = TextConfig("qwen2", 96, 32, 48, 2, 4, 2, 8, 1e-6, 1e6, True, 512)
QWEN_UNTIED = TextConfig("qwen2", 96, 32, 48, 2, 4, 2, 8, 1e-6, 1e6, False, 512)
LLAMA = TextConfig("llama", 96, 32, 48, 2, 4, 4, 8, 1e-5, 1e4, False, 512)
PINPOINTS = ((28, 28), (28, 56), (56, 28), (56, 56), (28, 84))

# (vision prefix, decoder prefix, head, newline, projector) of each naming, as published
LAYOUTS = {
    "hub": (
        "vision_tower.vision_model.",
        "language_model.model.",
        "language_model.lm_head.weight",
        "image_newline",
        "multi_modal_projector.linear_{}.",
    ),
    "memory4": (
        "model.vision_tower.vision_model.",
        "model.language_model.",
        "lm_head.weight",
        "model.image_newline",
        "model.multi_modal_projector.linear_{}.",
    ),
    "memory5": (
        "model.vision_tower.",
        "model.language_model.",
        "lm_head.weight",
        "model.image_newline",
        "model.multi_modal_projector.linear_{}.",
    ),
    "saved5": (
        "vision_tower.",
        "language_model.model.",
        "language_model.lm_head.weight",
        "image_newline",
        "multi_modal_projector.linear_{}.",
    ),
    "original": (  # lmms-lab and liuhaotian
        "model.vision_tower.vision_tower.vision_model.",
        "model.",
        "lm_head.weight",
        "model.image_newline",
        "model.mm_projector.{}.",
    ),
}


def weights(
    vision: VisionConfig, text: TextConfig, *, newline: bool, dtype: str = "float32", seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tensors by canonical name."""
    rng = np.random.default_rng(seed)
    shapes = names.expected(vision, text, has_newline=newline)
    return {n: rng.standard_normal(s, np.float32).astype(DTYPES[dtype]) for n, s in shapes.items()}


def stored(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The same tensors under the names of a layout."""
    vision, decoder, head, newline, projector = LAYOUTS[layout]
    linear = ("0", "2") if layout == "original" else ("1", "2")

    def rename(name: str) -> str:
        top, _, rest = name.partition(".")
        if top == "vision_tower":
            return vision + rest
        if top == "language_model":
            return decoder + rest
        if top == "multi_modal_projector":
            module, _, last = rest.partition(".")
            return projector.format(linear[module == "linear_2"]) + last
        return {"lm_head": head, "image_newline": newline}[top]

    return {rename(name): tensor for name, tensor in tensors.items()}


def write(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None, shards: int = 1
) -> Path:
    """A checkpoint folder by the library, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    parts = np.array_split(np.array(list(tensors)), shards)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_file({str(n): tensors[n] for n in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {str(n): f for f, part in zip(files, parts, strict=True) for n in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hub_config(vision: VisionConfig, text: TextConfig, **changes: Any) -> dict[str, Any]:
    """A config.json as the llava-hf repositories have it (written out, not by our writer)."""
    siglip = vision.model_type == "siglip"
    config: dict[str, Any] = {
        "model_type": "llava_onevision" if siglip else "llava",
        "image_token_index": 90,
        "vision_feature_layer": -1 if siglip else -2,
        "vision_feature_select_strategy": "full" if siglip else "default",
        "vision_config": tower_config(vision),
        "text_config": decoder_config(text),
    }
    if siglip:
        config["image_grid_pinpoints"] = [list(p) for p in PINPOINTS]
        config["vision_aspect_ratio"] = "anyres_max_4"
    return config | changes


def original_config(text: TextConfig, tower: str, **changes: Any) -> dict[str, Any]:
    """A config.json as lmms-lab and liuhaotian have it: the decoder's own, plus mm_* keys."""
    qwen = text.model_type == "qwen2"
    config = decoder_config(text) | {
        "model_type": "llava",
        "architectures": ["LlavaQwenForCausalLM" if qwen else "LlavaLlamaForCausalLM"],
        "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    if qwen:
        config |= {
            "image_aspect_ratio": "anyres_max_9",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[28, 28], [56, 28], [28, 56]],
        }
    else:
        config["image_aspect_ratio"] = "pad"
    return config | changes


def tower_config(vision: VisionConfig) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": f"{vision.model_type}_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    return config | ({"vision_use_head": False} if vision.model_type == "siglip" else {})


def decoder_config(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": text.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "max_position_embeddings": text.max_position_embeddings,
        "eos_token_id": 5,
    }


def model_config(vision: VisionConfig, text: TextConfig, fusion: str = "none") -> ModelConfig:
    """The model these checkpoints belong to."""
    siglip = vision.model_type == "siglip"
    image = ImageConfig(
        "anyres_max_4" if siglip else "pad",
        "pad_newline" if siglip else "same",
        PINPOINTS if siglip else (),
    )
    return ModelConfig(
        vision, text, image, fusion, registry.get(fusion).Config(), has_newline=siglip
    )


def abstract_params(config: ModelConfig, param_dtype: str = "float32") -> dict[str, Any]:
    """The model's parameters as shapes, unboxed; a new tree every time."""
    return jax.tree.map(lambda x: x, _traced(config, param_dtype))


@functools.cache
def _traced(config: ModelConfig, param_dtype: Any) -> dict[str, Any]:
    extras = registry.of(config).extras(config.fusion, config)
    batch = batch_lib.empty(
        rows=1,
        length=8,
        visual=4,
        tiles=1,
        images=1,
        tile_size=config.vision.image_size,
        patches=config.vision.num_patches,
        pooled=extras.pooled,
        stacks=extras.stacks,
    )
    compute = ComputeConfig(dtype="float32", param_dtype=param_dtype, remat="none")
    init = vlm.build(config, compute).init
    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), dict(batch))["params"])


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, dtype and shape included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by the library."""
    return {
        n: t for f in sorted(folder.glob("model*.safetensors")) for n, t in load_file(f).items()
    }


def source(
    tmp_path: Path,
    vision: VisionConfig,
    text: TextConfig,
    layout: str = "hub",
    dtype: str = "float32",
    shards: int = 1,
    **changes: Any,
) -> tuple[Path, dict[str, np.ndarray], Path | None]:
    """A checkpoint folder, the tensors in it, and the tower's own folder if it needs one."""
    tensors = weights(vision, text, newline=vision.model_type == "siglip", dtype=dtype)
    if layout == "original":
        config = original_config(text, f"somewhere/{vision.model_type}-of-ours", **changes)
        tower = write(tmp_path / "tower", {}, tower_config(described(vision)), shards=1)
    else:
        config, tower = hub_config(vision, text, **changes), None
    return write(tmp_path / "in", stored(tensors, layout), config, shards), tensors, tower


def described(vision: VisionConfig) -> VisionConfig:
    """The published tower of which this one is a part: SigLIP has a layer more."""
    extra = vision.model_type == "siglip"
    return dataclasses.replace(vision, num_hidden_layers=vision.num_hidden_layers + extra)
