"""Prompts of many sizes in batches of few shapes, so that few programs are compiled. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cli_jax.batch import Batch
from cli_jax.config import VisionConfig
from cli_jax.data import Sample, Sizes, collate
from cli_jax.data.collate import Extent
from cli_jax.image.extras import NO_EXTRAS, Extras

VISUAL_UNIT = 32
TEXT_UNIT = 64  # most questions, with the template's own words, fit into one of these


class Group(NamedTuple):
    """A batch with one prompt per row; `numbers` are its prompts', rows behind them are empty."""

    numbers: list[int]
    batch: Batch


def round_up(size: int, unit: int) -> int:
    """The next of unit, 2, 3, 4, 5, 6, 7, 8 units, then four steps per doubling.

    So at most a quarter of a long row is padding, and the number of different results up to n
    grows with log n.
    """
    step = unit
    while size > 8 * step:
        step *= 2
    return -(-max(size, 1) // step) * step


def bucket(extent: Extent) -> Extent:
    """The shape in which a prompt of this extent is run.

    Visual slots and text tokens are rounded apart, because prompts that ask about pictures of one
    size differ in their text only.
    """
    visual = round_up(extent.visual, VISUAL_UNIT)
    text = round_up(extent.text, TEXT_UNIT)
    tiles, images = round_up(extent.tiles, 1), round_up(extent.images, 1)
    return Extent(visual + text, visual, tiles, images, text)


def batches(
    prompts: Iterable[tuple[int, Sample]],
    rows: int,
    vision: VisionConfig,
    extras: Extras = NO_EXTRAS,
) -> Iterator[Group]:
    """Groups numbered prompts by bucket; a full group goes out at once, the others at the end.

    At most `rows` prompts per bucket are held. Every batch has `rows` rows, so a group that is not
    full costs no further compilation.
    """
    waiting: dict[Extent, list[tuple[int, Sample]]] = {}
    for number, sample in prompts:
        shape = bucket(sample.extent)
        group = waiting.setdefault(shape, [])
        group.append((number, sample))
        if len(group) == rows:
            yield _collate(waiting.pop(shape), shape, rows, vision, extras)
    for shape, group in waiting.items():
        yield _collate(group, shape, rows, vision, extras)


def _collate(
    group: list[tuple[int, Sample]], shape: Extent, rows: int, vision: VisionConfig, extras: Extras
) -> Group:
    sizes = Sizes(
        rows=rows,
        length=shape.tokens,
        visual=shape.visual,
        tiles=shape.tiles,
        images=shape.images,
        tile_size=vision.image_size,
        patches=vision.num_patches,
        text=shape.text,
        pooled=extras.pooled,
        stacks=extras.stacks,
    )
    return Group([number for number, _ in group], collate([[s] for _, s in group], sizes))
