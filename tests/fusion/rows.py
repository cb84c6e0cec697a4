"""Packed rows for the fusion tests: several samples, turns and any-resolution pictures per row.

Written from the contract in `cli_jax/batch.py` with plain loops and independent of `cli_jax/data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cli_jax.batch import IGNORE, Batch, empty
from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image.anyres import layout
from cli_jax.image.extras import NO_EXTRAS, Extras

VOCAB = 61
VISION = VisionConfig(
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=5,
    num_attention_heads=2,
    image_size=13,  # the convolution drops the last pixel
    patch_size=4,
)
IMAGE = ImageConfig(
    aspect_ratio="anyres_max_1",
    grid_pinpoints=tuple((13 * rows, 13 * columns) for rows in (1, 2) for columns in (1, 2)),
)
BASE_ONLY = (0, 0)  # a picture of one tile, without newlines


class Turn(NamedTuple):
    """Pictures by (width, height), then the question's tokens, then the answer's."""

    pictures: Sequence[tuple[int, int]]
    question: int
    answer: int


class Picture(NamedTuple):
    tiles: np.ndarray
    plan_index: np.ndarray
    plan_weight: np.ndarray
    newline: np.ndarray
    stack_index: np.ndarray
    stack_weight: np.ndarray
    start: int  # position of its first token in the sample
    end: int  # e_i: position of the first answer token after it, or the sample's length


class Sample(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    pictures: list[Picture]


def make_sample(rng: np.random.Generator, *turns: Turn, extras: Extras = NO_EXTRAS) -> Sample:
    """Random tokens and pixels in the shape of a conversation."""
    ids, labels, pictures = [], [], []
    for turn in turns:
        waiting = []
        for width, height in turn.pictures:
            square = (width, height) == BASE_ONLY
            config = ImageConfig(aspect_ratio="square") if square else IMAGE
            plan = layout(width or 1, height or 1, config, VISION, single=True, extras=extras)
            tiles = rng.integers(0, 256, (plan.num_tiles, 13, 13, 3), np.uint8)
            reads = plan.plan_index, plan.plan_weight, plan.newline
            stacks = plan.stack_index, plan.stack_weight
            waiting.append(Picture(tiles, *reads, *stacks, len(ids), -1))
            ids += [0] * plan.num_tokens
            labels += [IGNORE] * plan.num_tokens
        question = rng.integers(1, VOCAB, turn.question).tolist()
        answer = rng.integers(1, VOCAB, turn.answer).tolist()
        ids, labels = ids + question, labels + [IGNORE] * turn.question
        pictures += [picture._replace(end=len(ids)) for picture in waiting]
        ids, labels = ids + answer, labels + answer
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32), pictures)


def make_batch(
    rows: Sequence[Sequence[Sample]],
    *,
    length: int,
    visual: int,
    tiles: int,
    images: int,
    pooled: int = 0,
    stacks: int = 0,
) -> Batch:
    """Packs each row's samples one behind the other."""
    N = VISION.num_patches
    features = N + pooled  # of a tile
    batch = empty(
        rows=len(rows),
        length=length,
        visual=visual,
        tiles=tiles,
        images=images,
        tile_size=VISION.image_size,
        patches=N,
        pooled=pooled,
        stacks=stacks,
    )
    for b, samples in enumerate(rows):
        at = slot = tile = image = 0
        for segment, sample in enumerate(samples, 1):
            here = slice(at, at + len(sample.ids))
            batch["input_ids"][b, here] = sample.ids
            batch["labels"][b, here] = sample.labels
            batch["segment_ids"][b, here] = segment
            batch["positions"][b, here] = np.arange(len(sample.ids))
            for picture in sample.pictures:
                batch["pixel_values"][b, tile : tile + len(picture.tiles)] = picture.tiles
                for j, newline in enumerate(picture.newline):
                    batch["plan_index"][b, slot] = picture.plan_index[j] + tile * features
                    batch["plan_weight"][b, slot] = picture.plan_weight[j]
                    batch["visual_newline"][b, slot] = newline
                    batch["visual_image"][b, slot] = image
                    batch["visual_position"][b, slot] = at + picture.start + j
                    batch["visual_index"][b, at + picture.start + j] = slot
                    slot += 1
                for k in range(stacks):
                    for n in range(N):
                        index = picture.stack_index[k, n] + tile * features
                        batch["stack_index"][b, k, image, n] = index
                        batch["stack_weight"][b, k, image, n] = picture.stack_weight[k, n]
                batch["image_segment"][b, image] = segment
                batch["context_end"][b, image] = at + picture.end
                tile, image = tile + len(picture.tiles), image + 1
            at += len(sample.ids)
        for name in ("plan", "stack"):
            inverse = batch[f"{name}_inverse"][b]
            inverse[:] = invert(
                batch[f"{name}_index"][b], batch[f"{name}_weight"][b], inverse.shape
            )
    return batch


def invert(index: np.ndarray, weight: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The entries slot*4+c of a plan that read each patch with weight."""
    inverse = np.full(shape, index.size, np.int32)
    count = np.zeros(shape[0], int)
    for entry, (patch, w) in enumerate(zip(index.ravel(), weight.ravel(), strict=True)):
        if w:
            inverse[patch, count[patch]] = entry
            count[patch] += 1
    return inverse
