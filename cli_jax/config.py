"""What a model is: frozen dataclasses shared by host and device code. No jax here.

A config file (``configs/*.py``) becomes these once, at the door (``experiment.py``); everything
behind the door reads attributes and never a flag or a dictionary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


class ConfigError(ValueError):
    """A config value that cannot be used; the message names the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or CLIP vision tower; field names as in Hugging Face's vision configs.

    `num_hidden_layers` counts the layers the checkpoint holds: 26 for LLaVA-OneVision's SigLIP,
    whose 27th layer was deleted, and 24 for CLIP ViT-L/14.
    """

    model_type: Literal["siglip", "clip"] = "siglip"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 26
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    hidden_act: Literal["gelu_tanh", "quick_gelu", "gelu"] = "gelu_tanh"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # of position and class embeddings, when trained from scratch

    @property
    def grid(self) -> int:
        """Patches along one side of a tile; the convolution drops what is left over."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def last_layer(self) -> int:
        """V_last of method.md section 0: the index into hidden_states that feeds the projector."""
        return self.num_hidden_layers if self.model_type == "siglip" else self.num_hidden_layers - 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Qwen2 or LLaMA decoder; field names as in Hugging Face's configs."""

    model_type: Literal["qwen2", "llama"] = "qwen2"
    vocab_size: int = 152_000
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02  # of token embeddings, when trained from scratch

    @property
    def attention_bias(self) -> bool:
        """Qwen2 has biases on q, k and v; LLaMA has none."""
        return self.model_type == "qwen2"


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes tiles and visual tokens (LLaVA's preprocessing).

    aspect_ratio: how a single picture of a sample is treated.
      `anyres_max_N` any-resolution tiles, at most ~N x patches high-resolution tokens;
      `anyres`       the same without a maximum;
      `square`       squashed to one tile, no newline (OneVision stage 1);
      `pad`          padded to a square with the mean color, one tile, no newline (LLaVA-1.5);
      `crop`         shortest edge resized, center crop, one tile, no newline (LLaVA-1.5 stage 1).
    multi_image: how each picture of a sample with several pictures is treated: `pad_newline` is
      OneVision's (gray padding, one tile, one newline: 730 tokens), `same` repeats `aspect_ratio`.
    grid_pinpoints: tile grids as (height, width) in pixels, in the order in which ties are broken.
    rounding: `hf` rounds a resized side to 7 decimals before truncating, `original` does not.
    """

    aspect_ratio: str = "anyres_max_9"
    multi_image: Literal["pad_newline", "same"] = "pad_newline"
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    rounding: Literal["hf", "original"] = "hf"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_pixels: int = 100_000_000  # refused before decoding: decompression bombs


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the numbers are computed, never what they are."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    scan_layers: bool = True  # False unrolls: faster on CPU, slower to compile
    # What the backward pass recomputes (cli_jax/model/remat.py)
    remat: Literal["none", "dots", "dots_no_batch", "attention", "full", "offload"] = "full"
    # `auto`: splash on TPU, cudnn on GPU, xla elsewhere
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    loss_chunk: int = 0  # tokens per vocabulary-loss chunk; 0 = all at once


@dataclasses.dataclass(frozen=True)
class RoutingConfig:
    """Which tokens pass which decoder layers (docs/method.md section 3).

    name        `none`: all tokens pass all layers; `dpvr`: vision tokens leave the stack early
    saturation  s of `dpvr`: the first decoder layer that vision tokens do not pass
    """

    name: Literal["none", "dpvr"] = "none"
    saturation: int = 18


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model. `fusion` holds the chosen strategy's own frozen config dataclass."""

    vision: VisionConfig
    text: TextConfig
    image: ImageConfig
    fusion_name: str
    fusion: Any
    has_newline: bool = True  # LLaVA-1.5 has no image_newline parameter
    routing: RoutingConfig = RoutingConfig()
    projector_width: int = 0  # of the projector's hidden layer; 0 = the decoder's, as in LLaVA

    @property
    def projector_hidden(self) -> int:
        """Width of the projector's hidden layer."""
        return self.projector_width or self.text.hidden_size
