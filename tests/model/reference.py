"""The reference: tiny transformers models, every parameter redrawn, and their parameters as ours.

Nothing here uses cli_jax beyond its configs: the name map is written a second time, on purpose.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import transformers
from flax.traverse_util import unflatten_dict

from cli_jax.config import ModelConfig

torch.set_num_threads(1)  # threads only get into each other's way in models this small

IMAGE_TOKEN, VIDEO_TOKEN = 0, 1  # ids of the tiny vocabularies that no prompt uses

# What writes into a residual stream. Scaled down together they leave every normalized activation,
# and so the logits, nearly as they were, but variances so small that the norms' eps matter.
RESIDUAL_WRITERS = (
    r"patch_embedding|position_embedding|class_embedding|pre_layrnorm|out_proj|fc2"
    r"|linear_2|image_newline|embed_tokens|o_proj|down_proj"
)
NORM = re.compile(r"(layer_?norm\d?|layrnorm|\.norm)\.weight$")


def build(config: ModelConfig) -> torch.nn.Module:
    """LlavaOnevision* or Llava* of a config, in float32."""
    v, t = config.vision, config.text
    vision = {
        "hidden_size": v.hidden_size,
        "intermediate_size": v.intermediate_size,
        "num_hidden_layers": v.num_hidden_layers,
        "num_attention_heads": v.num_attention_heads,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
    }
    text = {
        "vocab_size": t.vocab_size,
        "hidden_size": t.hidden_size,
        "intermediate_size": t.intermediate_size,
        "num_hidden_layers": t.num_hidden_layers,
        "num_attention_heads": t.num_attention_heads,
        "num_key_value_heads": t.num_key_value_heads,
        "head_dim": t.head_dim,
        "max_position_embeddings": t.max_position_embeddings,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    # Not passed on from `config`: activations, eps and rope theta are the published models' own
    # (SigLIP so400m and CLIP ViT-L/14, Qwen2 and Vicuna), so that a wrong default is seen.
    if v.model_type == "siglip":
        whole = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**vision, vision_use_head=False),
            text_config=transformers.Qwen2Config(
                **text,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            ),
            image_grid_pinpoints=[list(pair) for pair in config.image.grid_pinpoints],
            vision_aspect_ratio=config.image.aspect_ratio,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=t.tie_word_embeddings,
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
        )
        model_class = transformers.LlavaOnevisionForConditionalGeneration
    else:
        whole = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**vision),
            text_config=transformers.LlamaConfig(
                **text,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=t.tie_word_embeddings,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=v.num_patches,
        )
        model_class = transformers.LlavaForConditionalGeneration
    whole._attn_implementation = "eager"
    return model_class(whole).float().eval()


def draw_parameters(model: torch.nn.Module, seed: int, scale: float) -> None:
    """Redraws every parameter in place; tied ones once.

    Matrices and embeddings get standard deviation 1/sqrt(fan_in), norm weights 1 + 0.3 n, biases
    0.3 n; what writes into a residual stream is multiplied by `scale`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if NORM.search(name):
                value = 1 + 0.3 * noise
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:  # an embedding's fan-in is its width, as in a tied head
                value = noise * (parameter[0] if parameter.ndim > 1 else parameter).numel() ** -0.5
            parameter.copy_(value * (scale if re.search(RESIDUAL_WRITERS, name) else 1.0))


def our_name(name: str, ndim: int) -> tuple[tuple[str, ...], int | None, tuple[int, ...]]:
    """A tensor's path in our parameters, its layer (None outside stacks) and its permutation."""
    *path, leaf = name.removeprefix("model.").split(".")
    axes = tuple(range(ndim))
    if leaf == "weight":
        if NORM.search(name):
            leaf = "scale"
        elif path[-1] in ("embed_tokens", "position_embedding"):
            leaf = "embedding"
        else:
            leaf, axes = "kernel", (2, 3, 1, 0) if ndim == 4 else (1, 0)
    layer = int(path.pop(path.index("layers") + 1)) if "layers" in path else None
    return (*path, leaf), layer, axes


def to_params(state: dict[str, torch.Tensor], *, tied: bool) -> dict[str, Any]:
    """A state dict as our nested parameters: kernels [in, out], layers stacked on axis 0."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and tied:
            continue
        path, layer, axes = our_name(name, tensor.ndim)
        value = np.ascontiguousarray(tensor.numpy().transpose(axes))
        if layer is None:
            flat[path] = value
        else:
            flat.setdefault(path, []).append(value)
            assert len(flat[path]) == layer + 1, f"{name} is out of order"
    return unflatten_dict(
        {path: np.stack(x) if isinstance(x, list) else x for path, x in flat.items()}
    )
