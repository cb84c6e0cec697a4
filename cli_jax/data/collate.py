"""Rows of samples to one batch of fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cli_jax.batch import Batch, empty
from cli_jax.config import VisionConfig
from cli_jax.experiment import ConfigError, DataConfig
from cli_jax.image.anyres import plan_inverse
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.image.grid import READS

if TYPE_CHECKING:
    from cli_jax.data.sample import Sample


class Extent(NamedTuple):
    """What a sample takes of a row, or a row of itself: the packed dimensions.

    `tokens` is the sum of `visual` and `text` for a sample; a row has room for each by itself.
    """

    tokens: int
    visual: int
    tiles: int
    images: int
    text: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of a batch (dimension key: B, L, P, M, I, H = W, N, Q, E, m)."""

    rows: int
    length: int
    visual: int
    tiles: int
    images: int
    tile_size: int
    patches: int
    text: int = 0
    pooled: int = 0
    stacks: int = 0

    @classmethod
    def from_config(
        cls, data: DataConfig, vision: VisionConfig, rows: int, extras: Extras = NO_EXTRAS
    ) -> Sizes:
        """The sizes of a config's batches; ConfigError if a row cannot hold a strategy's tokens."""
        sizes = ("visual_per_row", "tiles_per_row", "images_per_row", "text_per_row")
        if negative := [name for name in sizes if getattr(data, name) < 0]:
            raise ConfigError(f"config.data.{negative[0]} is negative: give 0 or more")
        if extras.stacks and not data.images_per_row:
            raise ConfigError("config.data.images_per_row=0: the fusion strategy needs a picture")
        tokens = vision.num_patches + extras.pooled
        if extras.pooled and data.visual_per_row < tokens:
            raise ConfigError(
                f"data.visual_per_row={data.visual_per_row} holds no picture: with the "
                f"{extras.pooled} tokens of the fusion strategy it has {tokens} or more"
            )
        return cls(
            rows=rows,
            length=data.row_length,
            visual=data.visual_per_row,
            tiles=data.tiles_per_row + data.images_per_row * extras.tiles,
            images=data.images_per_row,
            tile_size=vision.image_size,
            patches=vision.num_patches,
            text=data.text_per_row,
            pooled=extras.pooled,
            stacks=extras.stacks,
        )

    @property
    def row(self) -> Extent:
        """What one row can hold; without text slots, as much text as tokens."""
        return Extent(self.length, self.visual, self.tiles, self.images, self.text or self.length)


def collate(rows: Sequence[Sequence[Sample]], sizes: Sizes) -> Batch:
    """Lays samples out row by row, in order; see cli_jax/batch.py for the fields.

    Samples get segments 1, 2, ...; their plans are moved behind the tiles of the samples before
    them. Rows that are missing stay padding. Raises ValueError if a row does not fit.
    """
    if len(rows) > sizes.rows:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {sizes.rows}")
    batch = empty(**dataclasses.asdict(sizes))
    stride = sizes.patches + sizes.pooled
    for b, samples in enumerate(rows):
        token = visual = tile = image = text = 0
        for segment, sample in enumerate(samples, 1):
            n, v, m, i, t = sample.extent
            if any(
                used + more > room
                for used, more, room in zip(
                    (token, visual, tile, image, text), sample.extent, sizes.row, strict=True
                )
            ):
                raise ValueError(f"sample {sample.id!r} does not fit its row: {sizes.row}")
            at = slice(token, token + n)
            batch["input_ids"][b, at] = sample.ids
            batch["labels"][b, at] = sample.labels
            batch["segment_ids"][b, at] = segment
            batch["positions"][b, at] = np.arange(n)
            batch["pixel_values"][b, tile : tile + m] = sample.tiles
            at = slice(visual, visual + v)
            batch["plan_index"][b, at] = sample.plan_index + tile * stride
            batch["plan_weight"][b, at] = sample.plan_weight
            batch["visual_newline"][b, at] = sample.visual_newline
            batch["visual_image"][b, at] = sample.visual_image + image
            batch["visual_position"][b, at] = sample.visual_position + token
            batch["visual_index"][b, sample.visual_position + token] = np.arange(visual, visual + v)
            at = slice(image, image + i)
            batch["image_segment"][b, at] = segment
            batch["context_end"][b, at] = sample.context_end + token
            if sizes.stacks:
                batch["stack_index"][b, :, at] = sample.stack_index + tile * stride
                batch["stack_weight"][b, :, at] = sample.stack_weight
            token, visual, tile, image = token + n, visual + v, tile + m, image + i
            text += t
        if sizes.text:
            is_text = (batch["segment_ids"][b] > 0) & (batch["visual_index"][b] == sizes.visual)
            batch["text_position"][b, :text] = np.flatnonzero(is_text)
            batch["text_index"][b, is_text] = np.arange(text)
        batch["plan_inverse"][b] = plan_inverse(
            batch["plan_index"][b], batch["plan_weight"][b], sizes.tiles * stride
        )
        if sizes.stacks:
            batch["stack_inverse"][b] = plan_inverse(
                batch["stack_index"][b].reshape(-1, READS),
                batch["stack_weight"][b].reshape(-1, READS),
                sizes.tiles * stride,
                READS * sizes.stacks,
            )
    return batch
