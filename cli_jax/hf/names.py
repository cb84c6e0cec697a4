"""Names of parameters: ours, the canonical one, and the layouts found on disk.

Ours       `language_model/layers/self_attn/q_proj/kernel`, one array [layers, in, out]
canonical  `language_model.layers.{i}.self_attn.q_proj.weight`, `layers` arrays [out, in]
on disk    what a trainer or a library version made of it; `canonical` undoes that, `hub` is the
           layout we write: the one of the llava-hf repositories, which every transformers loads

Kernels are transposed between ours and the canonical form (`Leaf.axes`); nothing else changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.hf.error import ConversionError

Shape = tuple[int, ...]

# What old files carry and no model needs: buffers, recomputed from the config.
_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
# The other half of a two-tower checkpoint, and SigLIP's pooling head.
_NOT_THE_TOWER = re.compile(
    r"^(text_model\.|text_projection|visual_projection|logit_(scale|bias)|vision_tower\.head\.)"
)
_RENAMES = (
    # the wrapper's prefix, transformers >= 4.52 in memory
    (re.compile(r"^model\.(?=vision_tower\.|language_model\.|multi_modal_projector\.)"), ""),
    (re.compile(r"^model\.(?=image_newline$|mm_projector\.)"), ""),
    # lmms-lab and liuhaotian: the decoder's own names at the top
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "language_model."),
    (re.compile(r"^mm_projector\.0\."), "multi_modal_projector.linear_1."),
    (re.compile(r"^mm_projector\.2\."), "multi_modal_projector.linear_2."),
    (re.compile(r"^vision_tower\.vision_tower\."), "vision_tower."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
)
_TOWER_RENAMES = (
    (re.compile(r"^vision_model\."), "vision_tower."),
    (
        re.compile(r"^(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)"),
        "vision_tower.",
    ),
)
_VISION_LAYER = re.compile(r"^vision_tower\.encoder\.layers\.(\d+)\.")

_NORMS: tuple[str, ...] = (
    *("norm", "layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm"),
    *("input_layernorm", "post_attention_layernorm"),
)
_TABLES = ("embed_tokens", "position_embedding")
PROJECTOR = "multi_modal_projector"
BASE = ("vision_tower", PROJECTOR, "image_newline", "language_model", "lm_head")


def canonical(stored: str, *, tower: bool = False) -> str | None:
    """The canonical name of a stored tensor, or None for one that is not part of the model.

    tower: the file holds a vision tower by itself, or a two-tower model around it.
    """
    name = stored
    for pattern, replacement in (*(_TOWER_RENAMES if tower else ()), *_RENAMES):
        name = pattern.sub(replacement, name)
    if _BUFFERS.search(name) or _NOT_THE_TOWER.match(name):
        return None
    return name


def hub(name: str) -> str:
    """The stored name, in the layout of the llava-hf repositories, of a canonical name."""
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def vision_layer(name: str) -> int | None:
    """The vision layer a canonical name belongs to."""
    match = _VISION_LAYER.match(name)
    return int(match[1]) if match else None


def check_projector(model: ModelConfig) -> None:
    """Raises ConversionError for a projector that no Hugging Face format describes."""
    if model.projector_hidden != model.text.hidden_size:
        raise ConversionError(
            f"config.model.projector_width={model.projector_width}: a projector in Hugging Face's "
            f"format is as wide as the decoder ({model.text.hidden_size}). Set it to 0, or keep to "
            "workdirs of train.py, which hold any width"
        )


def expected(
    vision: VisionConfig, text: TextConfig, *, has_newline: bool, has_projector: bool = True
) -> dict[str, Shape]:
    """Every tensor of the base model by canonical name, with its stored shape ([out, in]).

    has_projector: a fusion strategy may do without, or have its own (`fusion/base.py`);
    checkpoints have one.
    """
    V, D = vision.hidden_size, text.hidden_size
    shapes: dict[str, Shape] = {}

    def linear(name: str, inputs: int, outputs: int, *, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (V,)

    tower, clip = "vision_tower", vision.model_type == "clip"
    if clip:
        shapes[f"{tower}.embeddings.class_embedding"] = (V,)
    patch = f"{tower}.embeddings.patch_embedding"
    shapes[f"{patch}.weight"] = (V, 3, vision.patch_size, vision.patch_size)
    if not clip:
        shapes[f"{patch}.bias"] = (V,)
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (vision.num_patches + clip, V)
    if clip:
        layer_norm(f"{tower}.pre_layrnorm")
    for i in range(vision.num_hidden_layers):
        layer = f"{tower}.encoder.layers.{i}"
        layer_norm(f"{layer}.layer_norm1")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", V, V, bias=True)
        layer_norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", V, vision.intermediate_size, bias=True)
        linear(f"{layer}.mlp.fc2", vision.intermediate_size, V, bias=True)
    layer_norm(f"{tower}.post_layernorm")

    if has_projector:
        linear(f"{PROJECTOR}.linear_1", V, D, bias=True)
        linear(f"{PROJECTOR}.linear_2", D, D, bias=True)
    if has_newline:
        shapes["image_newline"] = (D,)

    shapes["language_model.embed_tokens.weight"] = (text.vocab_size, D)
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    for i in range(text.num_hidden_layers):
        layer = f"language_model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        linear(f"{layer}.self_attn.q_proj", D, queries, bias=text.attention_bias)
        linear(f"{layer}.self_attn.k_proj", D, keys, bias=text.attention_bias)
        linear(f"{layer}.self_attn.v_proj", D, keys, bias=text.attention_bias)
        linear(f"{layer}.self_attn.o_proj", queries, D, bias=False)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        linear(f"{layer}.mlp.gate_proj", D, text.intermediate_size, bias=False)
        linear(f"{layer}.mlp.up_proj", D, text.intermediate_size, bias=False)
        linear(f"{layer}.mlp.down_proj", text.intermediate_size, D, bias=False)
    shapes["language_model.norm.weight"] = (D,)
    if not text.tie_word_embeddings:
        linear("lm_head", D, text.vocab_size, bias=False)
    return shapes


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters and the stored tensors it is made of.

    names: one canonical name, or one per layer where `stacked`: axis 0 of ours.
    axes: our axes (without the layer axis) as indices into the stored tensor's.
    """

    path: str
    names: tuple[str, ...]
    stacked: bool
    axes: tuple[int, ...]
    shape: Shape


def leaves(shapes: Mapping[str, Shape]) -> dict[str, Leaf]:
    """Our parameters by path, for the tensors of `expected`."""
    groups: dict[str, list[str]] = {}
    for name in shapes:  # layers come in order
        groups.setdefault(_path(name), []).append(name)
    return {path: _leaf(path, names, shapes[names[0]]) for path, names in groups.items()}


def _leaf(path: str, names: list[str], stored: Shape) -> Leaf:
    axes = tuple(range(len(stored)))
    if path.endswith("/kernel"):
        axes = (1, 0) if len(stored) == 2 else (2, 3, 1, 0)
    stacked = ".layers." in names[0]
    shape = tuple(stored[a] for a in axes)
    return Leaf(path, tuple(names), stacked, axes, (len(names), *shape) if stacked else shape)


def _path(name: str) -> str:
    *modules, last = [part for part in name.split(".") if not part.isdigit()]
    if last == "weight":
        kinds = {**dict.fromkeys(_NORMS, "scale"), **dict.fromkeys(_TABLES, "embedding")}
        last = kinds.get(modules[-1], "kernel")
    return "/".join([*modules, last])
