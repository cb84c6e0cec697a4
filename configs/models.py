"""Model shapes: published towers, decoders and image treatments, and a small family for laptops.

Every function gives the keyword arguments of one dataclass of `cli_jax/config.py`, as a dictionary
for the `model.vision`, `model.text` or `model.image` section of a config.
"""

from __future__ import annotations

from typing import Any

Section = dict[str, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# Vision towers ---------------------------------------------------------------------------------


def siglip_so400m_384() -> Section:
    """SigLIP so400m/14-384 as LLaVA-OneVision uses it: 26 of its 27 layers."""
    return {
        "model_type": "siglip",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_tanh",
        "layer_norm_eps": 1e-6,
    }


def clip_l14_336() -> Section:
    """CLIP ViT-L/14-336, LLaVA-1.5's tower."""
    return {
        "model_type": "clip",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


# Decoders --------------------------------------------------------------------------------------


def qwen2_0p5b() -> Section:
    """Qwen2-0.5B with the vocabulary of llava-hf/llava-onevision-qwen2-0.5b-ov-hf."""
    return _qwen2(
        vocab_size=152_000,  # lmms-lab's own checkpoints: 151,936
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )


def qwen2_7b() -> Section:
    """Qwen2-7B with the vocabulary of llava-hf/llava-onevision-qwen2-7b-ov-hf."""
    return _qwen2(
        vocab_size=152_128,  # lmms-lab's own checkpoints: 152,064
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )


def vicuna_7b() -> Section:
    """Vicuna-7B v1.5 with the vocabulary of llava-hf/llava-1.5-7b-hf."""
    return _llama(
        vocab_size=32_064,  # liuhaotian/llava-v1.5-7b: 32,000
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )


def _qwen2(**shape: Any) -> Section:
    return {
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
        **shape,
    }


def _llama(*, num_attention_heads: int, **shape: Any) -> Section:
    return {
        "model_type": "llama",
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        **shape,
    }


# Image treatments ------------------------------------------------------------------------------


def onevision_images() -> Section:
    """LLaVA-OneVision's `anyres_max_9`: 1x1 to 6x6 tiles of 384 pixels, at most 8,829 tokens."""
    sides = [384 * n for n in range(1, 7)]
    return {
        "aspect_ratio": "anyres_max_9",
        "multi_image": "pad_newline",
        "grid_pinpoints": tuple((height, width) for height in sides for width in sides),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }


def onevision_stage1_images() -> Section:
    """LLaVA-OneVision stage 1: every picture squashed to one tile, 729 tokens."""
    return onevision_images() | {"aspect_ratio": "square", "multi_image": "same"}


def llava15_images() -> Section:
    """LLaVA-1.5: every picture padded to a square, one tile, 576 tokens."""
    return {
        "aspect_ratio": "pad",
        "multi_image": "same",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def llava15_stage1_images() -> Section:
    """LLaVA-1.5 stage 1: the center of every picture instead."""
    return llava15_images() | {"aspect_ratio": "crop"}


# Small models, trained from scratch --------------------------------------------------------------


def small_tower(*, image_size: int, patch_size: int, width: int, layers: int) -> Section:
    """A SigLIP of a few layers. Positions start as large as patches do: a decoder that cannot tell
    patches apart from the first step on never learns to look at one of them."""
    return {
        "model_type": "siglip",
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
        "initializer_range": 1.0,
    }


def small_decoder(*, width: int, layers: int) -> Section:
    """A Qwen2 of a few layers for the demo tokenizer (cli_jax/demo)."""
    heads = width // 32
    return _qwen2(
        vocab_size=320,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        tie_word_embeddings=False,
        initializer_range=0.1,
    ) | {"rope_theta": 1e4, "max_position_embeddings": 2048}
