"""The oracle: our model against transformers', in float32, with every parameter redrawn.

`python -m tests.model.table` prints what is reached, and what every listed mistake would do.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from cli_jax.batch import Batch
from cli_jax.config import ComputeConfig, ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.image.preprocess import make_tiles, normalize
from cli_jax.model.vlm import VLM, build
from tests.model import reference
from tests.model.samples import IMAGE, Place, Prompt, batch_of, layouts, prompt

BOUND = 1e-5  # of the standard deviation of what is compared
TILE, PATCH = 30, 7  # 4 x 4 patches, two pixels dropped
SIZES = {  # pictures of a prompt, (width, height)
    "one_tile": [(30, 30)],
    "smaller_than_a_tile": [(11, 17)],
    "wide": [(75, 40)],
    "tall": [(31, 101)],
    "odd_padding": [(40, 61)],
    "kept_above_the_maximum": [(120, 76)],
    "shrunk": [(120, 120)],
    "shrunk_and_cut": [(173, 140)],
    "two_pictures": [(50, 20), (33, 64)],
    "three_pictures": [(30, 30), (7, 90), (44, 44)],
    "no_picture": [],
}
# Every prompt alone and right-padded, then several in a row, after and before each other.
ROWS = (
    *((name,) for name in SIZES),
    ("no_picture", "wide", "two_pictures", "one_tile"),
    ("three_pictures", "shrunk_and_cut", "no_picture"),
)
LENGTH = 400
SCANNED = ComputeConfig(dtype="float32", scan_layers=True, remat="full")
LOOPED = ComputeConfig(dtype="float32", scan_layers=False, remat="none")


class Case(NamedTuple):
    """A tiny model: its config, the reference, the same parameters as ours, and prompts."""

    config: ModelConfig
    model: torch.nn.Module
    params: dict[str, Any]
    prompts: dict[str, Prompt]


def _siglip_qwen2(tied: bool) -> ModelConfig:
    sides = [TILE * n for n in range(1, 5)]
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
        ),
        text=TextConfig(
            vocab_size=131,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6 if tied else 4,  # head_dim is hidden / heads in one of them only
            num_key_value_heads=2,
            head_dim=8 if tied else 16,
            tie_word_embeddings=tied,
        ),
        image=ImageConfig(grid_pinpoints=tuple((h, w) for h in sides for w in sides)),
        fusion_name="none",
        fusion=NoneConfig(),
    )


def _clip_llama() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            model_type="clip",
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        ),
        text=TextConfig(
            model_type="llama",
            vocab_size=131,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=12,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            tie_word_embeddings=False,
        ),
        image=ImageConfig(
            aspect_ratio="pad",
            multi_image="same",
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
        ),
        fusion_name="none",
        fusion=NoneConfig(),
        has_newline=False,
    )


CONFIGS = {
    "siglip_qwen2": _siglip_qwen2(tied=False),
    "siglip_qwen2_tied": _siglip_qwen2(tied=True),
    "clip_llama": _clip_llama(),
}


@functools.cache
def case(name: str, *, scale: float = 1.0, seed: int = 0) -> Case:
    """A named model; `seed` and `scale` as in reference.draw_parameters."""
    config = CONFIGS[name]
    model = reference.build(config)
    reference.draw_parameters(model, seed, scale)
    params = reference.to_params(model.state_dict(), tied=config.text.tie_word_embeddings)
    prompts = {
        key: prompt(key, seed, config.text.vocab_size, sizes) for key, sizes in SIZES.items()
    }
    return Case(config, model, params, prompts)


def pixels(case: Case, prompt: Prompt) -> list[np.ndarray]:
    """The float pixel values of a prompt's pictures, [tiles, 3, H, W] each."""
    c = case.config
    return [
        normalize(make_tiles(image, c.image, c.vision, single=prompt.single), c.image).transpose(
            0, 3, 1, 2
        )
        for image in prompt.pictures
    ]


def reference_inputs(case: Case, prompt: Prompt) -> dict[str, Any]:
    """The reference's arguments for one prompt alone."""
    tokens = iter([plan.num_tokens for plan in layouts(prompt, case.config)])
    ids: list[int] = []
    for token in prompt.ids:
        ids += [reference.IMAGE_TOKEN] * next(tokens) if token == IMAGE else [token]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    tiles = pixels(case, prompt)
    if not tiles:
        return inputs
    if case.config.vision.model_type == "clip":
        return {**inputs, "pixel_values": torch.from_numpy(np.concatenate(tiles))}
    most = max(len(t) for t in tiles)
    padded = [np.pad(t, ((0, most - len(t)), (0, 0), (0, 0), (0, 0))) for t in tiles]
    return {
        **inputs,
        "pixel_values": torch.from_numpy(np.stack(padded)),
        "image_sizes": torch.tensor([[p.height, p.width] for p in prompt.pictures]),
        "batch_num_images": torch.tensor([len(tiles)]),
    }


@functools.cache
def reference_logits(name: str, prompt: str, *, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Logits [L, vocab] of a named prompt alone in a named case's reference."""
    right = case(name, scale=scale, seed=seed)
    with torch.no_grad():
        return right.model(**reference_inputs(right, right.prompts[prompt])).logits[0].numpy()


def reference_hidden_states(case: Case, tiles: np.ndarray) -> np.ndarray:
    """Every vision layer's hidden state without CLS [layers + 1, tiles, N, V]."""
    with torch.no_grad():
        out = case.model.model.vision_tower(torch.from_numpy(tiles), output_hidden_states=True)
    states = np.stack([state.numpy() for state in out.hidden_states])
    return states[:, :, 1:] if case.config.vision.model_type == "clip" else states


def logits(model: VLM, params: Any, batch: Batch) -> jax.Array:
    """Our logits [B, L, vocab]."""
    output = model.apply({"params": params}, batch)
    return model.apply({"params": params}, output.hidden, method="logits")


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference, in standard deviations of the reference."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(ours.astype(np.float64) - theirs)) / np.std(theirs))


def logit_errors(name: str, compute: ComputeConfig, *, seed: int = 0) -> dict[Place, float]:
    """Of every prompt in ROWS the largest logit error over its positions."""
    right = case(name, seed=seed)
    batch, places = batch_of(ROWS, right.prompts, right.config, length=LENGTH)
    model = build(right.config, compute)
    ours = np.asarray(jax.jit(lambda *args: logits(model, *args))(right.params, batch))
    return {p: error(p.of(ours), reference_logits(name, p.name, seed=seed)) for p in places}


def hidden_state_errors(name: str, compute: ComputeConfig) -> list[float]:
    """Of every vision layer's hidden state, 0 = embeddings, the largest error."""
    right = case(name)
    batch, _ = batch_of([["three_pictures", "wide"]], right.prompts, right.config, length=LENGTH)
    tiles, layers = batch["pixel_values"], range(right.config.vision.num_hidden_layers + 1)
    model = build(right.config, compute)
    ours = jax.jit(
        lambda params, x: model.apply({"params": params}, x, tuple(layers), method="vision")
    )(right.params, tiles)
    theirs = reference_hidden_states(
        right, normalize(tiles[0], right.config.image).transpose(0, 3, 1, 2)
    )
    ours = np.asarray(ours).reshape(theirs.shape)
    return [error(*pair) for pair in zip(ours, theirs, strict=True)]
