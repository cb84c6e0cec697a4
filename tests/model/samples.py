"""Samples of the oracle: prompts with pictures of telling sizes, and rows of them as a Batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cli_jax.batch import IGNORE, Batch
from cli_jax.config import ModelConfig
from cli_jax.data.collate import Sizes, collate
from cli_jax.data.sample import Sample
from cli_jax.fusion import registry
from cli_jax.image.anyres import ImageLayout, layout
from cli_jax.image.extras import Extras
from cli_jax.image.preprocess import make_tiles

IMAGE = -200  # stands for a whole picture in a prompt's ids
FIRST_TEXT_ID = 2  # below are the reference's image and video tokens

Change = Callable[[ImageLayout], ImageLayout]


class Prompt(NamedTuple):
    """Token ids with IMAGE where a picture stands, and the pictures in that order."""

    ids: tuple[int, ...]
    pictures: tuple[Image.Image, ...]

    @property
    def single(self) -> bool:
        return len(self.pictures) == 1


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise on a ramp: nothing symmetric, nothing smooth, so that no two patches look alike."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(0, 90, height), np.linspace(0, 60, width))[..., None]
    noise = rng.integers(0, 106, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8))


def prompt(name: str, seed: int, vocab: int, sizes: Sequence[tuple[int, int]]) -> Prompt:
    """Random text around pictures of `sizes` (width, height): before, between and after them."""
    rng = np.random.default_rng([seed, *name.encode()])
    ids: list[int] = rng.integers(FIRST_TEXT_ID, vocab, 5).tolist()
    for _ in sizes:
        ids += [IMAGE, *rng.integers(FIRST_TEXT_ID, vocab, 4).tolist()]
    ids += rng.integers(FIRST_TEXT_ID, vocab, 7).tolist()
    return Prompt(tuple(ids), tuple(picture(*size, seed + i) for i, size in enumerate(sizes)))


def extras_of(config: ModelConfig) -> Extras:
    return registry.of(config).extras(config.fusion, config)


def treatment(prompt: Prompt, config: ModelConfig) -> dict[str, Any]:
    """How a prompt's pictures are treated, as `layout` and `make_tiles` want to know it."""
    return {"single": prompt.single, "extras": extras_of(config)}


def layouts(prompt: Prompt, config: ModelConfig) -> list[ImageLayout]:
    how = treatment(prompt, config)
    return [layout(*image.size, config.image, config.vision, **how) for image in prompt.pictures]


def to_sample(name: str, prompt: Prompt, config: ModelConfig, change: Change) -> Sample:
    """The prompt with its pictures' tokens in place; `change` may spoil their layouts."""
    plans = [change(plan) for plan in layouts(prompt, config)]
    tokens = iter([plan.num_tokens for plan in plans])
    ids = np.array([i for t in prompt.ids for i in ([t] * next(tokens) if t == IMAGE else [t])])
    first_tile = np.cumsum([0, *(plan.num_tiles for plan in plans)])[:-1]
    size, N, extras = config.vision.image_size, config.vision.num_patches, extras_of(config)
    none, no_stacks = np.zeros((0, 4)), np.zeros((extras.stacks, 0, N, 4))
    before = first_tile * (N + extras.pooled)
    return Sample(
        id=name,
        ids=np.where(ids == IMAGE, 0, ids).astype(np.int32),
        labels=np.full(len(ids), IGNORE, np.int32),
        visual_position=np.flatnonzero(ids == IMAGE).astype(np.int32),
        visual_image=np.repeat(np.arange(len(plans)), [p.num_tokens for p in plans]).astype(
            np.int32
        ),
        visual_newline=np.concatenate([none[:, 0].astype(bool), *(p.newline for p in plans)]),
        plan_index=np.concatenate(
            [none, *(p.plan_index + b for p, b in zip(plans, before, strict=True))]
        ).astype(np.int32),
        plan_weight=np.concatenate([none, *(p.plan_weight for p in plans)]).astype(np.float32),
        tiles=np.concatenate(
            [
                np.zeros((0, size, size, 3), np.uint8),
                *(
                    make_tiles(image, config.image, config.vision, **treatment(prompt, config))
                    for image in prompt.pictures
                ),
            ]
        ),
        context_end=np.full(len(plans), len(ids), np.int32),
        stack_index=np.concatenate(
            [
                no_stacks,
                *(p.stack_index[:, None] + b for p, b in zip(plans, before, strict=True)),
            ],
            axis=1,
        ).astype(np.int32),
        stack_weight=np.concatenate(
            [no_stacks, *(p.stack_weight[:, None] for p in plans)], axis=1
        ).astype(np.float32),
    )


class Place(NamedTuple):
    """Where a prompt lies in a batch."""

    name: str
    row: int
    start: int
    length: int

    def of(self, x_BxL: np.ndarray) -> np.ndarray:
        """The prompt's part [length, ...] of an array [B, L, ...]."""
        return x_BxL[self.row, self.start : self.start + self.length]


def batch_of(
    rows: Sequence[Sequence[str]],
    prompts: dict[str, Prompt],
    config: ModelConfig,
    *,
    length: int,
    change: Change = lambda plan: plan,
) -> tuple[Batch, list[Place]]:
    """Rows of named prompts, packed from the left, with room left over in every dimension."""
    samples = [[to_sample(name, prompts[name], config, change) for name in row] for row in rows]
    used = np.max(
        [np.reshape([s.extent for s in row], (-1, 5)).sum(axis=0) for row in samples], axis=0
    )
    sizes = Sizes(
        rows=len(rows),
        length=length,
        visual=int(used[1]) + 3,
        tiles=int(used[2]) + 1,
        images=int(used[3]) + 1,
        tile_size=config.vision.image_size,
        patches=config.vision.num_patches,
        pooled=extras_of(config).pooled,
        stacks=extras_of(config).stacks,
    )
    places = [
        Place(s.id, b, sum(len(before.ids) for before in row[:i]), len(s.ids))
        for b, row in enumerate(samples)
        for i, s in enumerate(row)
    ]
    return collate(samples, sizes), places
