"""Samples of the oracle: prompts with pictures of telling sizes, and rows of them as a Batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from cli_jax.batch import IGNORE, Batch
from cli_jax.config import ModelConfig
from cli_jax.data.collate import Sizes, collate
from cli_jax.data.sample import Sample
from cli_jax.image.anyres import ImageLayout, layout
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


def layouts(prompt: Prompt, config: ModelConfig) -> list[ImageLayout]:
    return [
        layout(*image.size, config.image, config.vision, single=prompt.single)
        for image in prompt.pictures
    ]


def to_sample(name: str, prompt: Prompt, config: ModelConfig, change: Change) -> Sample:
    """The prompt with its pictures' tokens in place; `change` may spoil their layouts."""
    plans = [change(plan) for plan in layouts(prompt, config)]
    tokens = iter([plan.num_tokens for plan in plans])
    ids = np.array([i for t in prompt.ids for i in ([t] * next(tokens) if t == IMAGE else [t])])
    first_tile = np.cumsum([0, *(plan.num_tiles for plan in plans)])[:-1]
    size, N = config.vision.image_size, config.vision.num_patches
    none = np.zeros((0, 4))
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
            [none, *(p.plan_index + t * N for p, t in zip(plans, first_tile, strict=True))]
        ).astype(np.int32),
        plan_weight=np.concatenate([none, *(p.plan_weight for p in plans)]).astype(np.float32),
        tiles=np.concatenate(
            [
                np.zeros((0, size, size, 3), np.uint8),
                *(
                    make_tiles(image, config.image, config.vision, single=prompt.single)
                    for image in prompt.pictures
                ),
            ]
        ),
        context_end=np.full(len(plans), len(ids), np.int32),
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
    )
    places = [
        Place(s.id, b, sum(len(before.ids) for before in row[:i]), len(s.ids))
        for b, row in enumerate(samples)
        for i, s in enumerate(row)
    ]
    return collate(samples, sizes), places
