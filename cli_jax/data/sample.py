"""One JSON row to numpy arrays: tokens, visual slots with their gather plan, tiles, labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data.augment import NO_AUGMENTATION, Augmentation, augment
from cli_jax.data.collate import Extent, Sizes
from cli_jax.data.sources import RowError
from cli_jax.experiment import DataConfig
from cli_jax.image.anyres import ImageLayout, layout, layout_size
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.image.grid import READS
from cli_jax.image.preprocess import image_size, make_tiles, open_image
from cli_jax.text.conversation import before_last_answer, exchanges, one_exchange
from cli_jax.text.encode import (
    IMAGE,
    Encoded,
    Labels,
    Template,
    encode_conversation,
    encode_history,
)
from cli_jax.text.tokenizer import Tokenizer


class TooLong(ValueError):
    """A sample that no row can hold; `dimension` is the field of Extent that it exceeds."""

    def __init__(self, dimension: str, needed: int, room: int):
        super().__init__(f"{needed} {dimension} do not fit a row of {room}")
        self.dimension = dimension


def _no_stacks() -> np.ndarray:
    return np.zeros((0, 0, 0, READS), np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One row before packing; n tokens, v visual slots, m tiles, i images (batch.py names them).

    ids              int32   [n]     0 at visual positions
    labels           int32   [n]
    visual_position  int32   [v]     position in the sample
    visual_image     int32   [v]     image of the sample the slot belongs to
    visual_newline   bool    [v]
    plan_index       int32   [v, 4]  patches of the sample's own tiles
    plan_weight      float32 [v, 4]
    tiles            uint8   [m, H, W, 3]
    context_end      int32   [i]     e_i: first content token of the first answer after the image,
                                     n if there is none
    stack_index, stack_weight  [s, i, N, 4]  the s stacks of each image (batch.py), if there are any
    """

    id: str
    ids: np.ndarray
    labels: np.ndarray
    visual_position: np.ndarray
    visual_image: np.ndarray
    visual_newline: np.ndarray
    plan_index: np.ndarray
    plan_weight: np.ndarray
    tiles: np.ndarray
    context_end: np.ndarray
    stack_index: np.ndarray = dataclasses.field(default_factory=_no_stacks)
    stack_weight: np.ndarray = dataclasses.field(default_factory=_no_stacks)

    @property
    def extent(self) -> Extent:
        tokens, visual = len(self.ids), len(self.visual_position)
        return Extent(tokens, visual, len(self.tiles), len(self.context_end), tokens - visual)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """How rows become samples; `room` is what a sample may take at most."""

    tokenizer: Tokenizer
    template: Template
    labels: Labels
    image: ImageConfig
    vision: VisionConfig
    room: Extent
    extras: Extras = NO_EXTRAS
    augmentation: Augmentation = NO_AUGMENTATION
    one_question: bool = False

    @classmethod
    def from_config(
        cls,
        data: DataConfig,
        image: ImageConfig,
        vision: VisionConfig,
        tokenizer: Tokenizer,
        extras: Extras = NO_EXTRAS,
    ) -> SampleSpec:
        return cls(
            tokenizer=tokenizer,
            template=data.template,
            labels=data.labels,
            image=image,
            vision=vision,
            room=Sizes.from_config(data, vision, 1, extras).row,
            extras=extras,
            augmentation=Augmentation(data.augment, data.jitter),
            one_question=data.turns == "one",
        )


def make_sample(
    row: Mapping[str, Any], root: str, spec: SampleSpec, rng: np.random.Generator | None = None
) -> Sample:
    """The training sample of a row whose pictures lie under `root`.

    `rng` picks the question and drives the augmentation, where the spec asks for them. Raises
    RowError, ConversationError or ImageError for a bad row, TooLong for one that no row can hold.
    """
    paths, conversations = _image_paths(row), row.get("conversations")
    if rng is None and (spec.augmentation or spec.one_question):
        raise ValueError("augmentation or turns='one' is on: give a random generator")
    if rng is not None and spec.one_question:
        conversations = one_exchange(conversations, len(paths), lambda n: int(rng.integers(n)))
    encoded = encode_conversation(
        conversations,
        spec.tokenizer,
        spec.template,
        spec.labels,
        num_images=len(paths),
    )
    images = _open(paths, root, spec)
    return _assemble(row, encoded, images, spec, rng if spec.augmentation else None)


def measure(row: Mapping[str, Any], root: str, spec: SampleSpec) -> Extent:
    """What the training sample of a row will take, from the headers of its pictures alone.

    With turns="one" it is the extent with the longest question, which no draw exceeds. Raises as
    `make_sample` does, but for what is wrong with the pictures' contents.
    """
    paths, conversations = _image_paths(row), row.get("conversations")
    choices = exchanges(conversations, len(paths)) if spec.one_question else [conversations]
    ids = max(
        len(
            encode_conversation(
                choice, spec.tokenizer, spec.template, spec.labels, num_images=len(paths)
            ).ids
        )
        for choice in choices
    )
    _check_room("images", len(paths), spec.room.images)
    sizes = [image_size(root, path, spec.image.max_pixels) for path in paths]
    how: Any = {"single": len(paths) == 1, "extras": spec.extras}
    taken = [layout_size(*size, spec.image, spec.vision, **how) for size in sizes]
    return _extent(ids, taken, spec.room)


def make_prompt_sample(row: Mapping[str, Any], root: str, spec: SampleSpec) -> Sample:
    """The prompt of a row for generation: all turns before its last answer, pictures included.

    No label is set and nothing is augmented. `context_end` is the prompt's length, or the first
    earlier answer after the image where the prompt holds one, as in training. Raises as above.
    """
    paths = _image_paths(row)
    encoded = encode_history(
        before_last_answer(row.get("conversations")),
        spec.tokenizer,
        spec.template,
        num_images=len(paths),
    )
    return _assemble(row, encoded, _open(paths, root, spec), spec, None)


def _image_paths(row: Mapping[str, Any]) -> list[str]:
    """`image` is a path, a list of paths or absent (also null, empty): no picture."""
    if "video" in row:
        raise RowError("the row has a video, which is not supported")
    value = row.get("image") or []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(path, str) for path in value):
        raise RowError(f"image is neither a path nor a list of paths: {value!r:.80}")
    return value


def _open(paths: list[str], root: str, spec: SampleSpec) -> list[Image.Image]:
    # The number is checked first: a row with a thousand pictures would be decoded only to be
    # dropped.
    _check_room("images", len(paths), spec.room.images)
    return [open_image(root, path, spec.image.max_pixels) for path in paths]


def _extent(ids: int, taken: Sequence[tuple[int, int]], room: Extent) -> Extent:
    """The extent of encoded ids with pictures of so many (tiles, tokens); TooLong if no row can."""
    visual = sum(tokens for _, tokens in taken)
    extent = Extent(
        tokens=ids - len(taken) + visual,
        visual=visual,
        tiles=sum(tiles for tiles, _ in taken),
        images=len(taken),
        text=ids - len(taken),
    )
    for dimension, needed in extent._asdict().items():
        _check_room(dimension, needed, getattr(room, dimension))
    return extent


def _check_room(dimension: str, needed: int, room: int) -> None:
    if needed > room:
        raise TooLong(dimension, needed, room)


def _assemble(
    row: Mapping[str, Any],
    encoded: Encoded,
    images: list[Image.Image],
    spec: SampleSpec,
    rng: np.random.Generator | None,
) -> Sample:
    how: Any = {"single": len(images) == 1, "extras": spec.extras}
    layouts = [layout(*image.size, spec.image, spec.vision, **how) for image in images]
    taken = [(each.num_tiles, each.num_tokens) for each in layouts]
    tokens = _extent(len(encoded.ids), taken, spec.room).tokens

    # Every id repeats once, a picture as often as it has tokens.
    slots = np.flatnonzero(encoded.ids == IMAGE)
    repeats = np.ones(len(encoded.ids), np.int64)
    repeats[slots] = [each.num_tokens for each in layouts]
    starts = np.cumsum(repeats) - repeats  # position of every id after the expansion
    ids = np.repeat(encoded.ids, repeats)
    is_visual = ids == IMAGE
    ids[is_visual] = 0

    # The answers are in order, so the first one after a picture is found by bisection.
    answers = np.append(starts[encoded.answer_starts], tokens)
    context_end = answers[np.searchsorted(answers, starts[slots], side="right")]

    if rng is not None:
        images = [augment(image, rng, spec.augmentation) for image in images]
    size = spec.vision.image_size
    return Sample(
        id=str(row.get("id", "")),
        ids=ids,
        labels=np.repeat(encoded.labels, repeats),
        visual_position=np.flatnonzero(is_visual).astype(np.int32),
        visual_image=np.repeat(np.arange(len(images)), repeats[slots]).astype(np.int32),
        tiles=np.concatenate(
            [
                np.zeros((0, size, size, 3), np.uint8),
                *(make_tiles(image, spec.image, spec.vision, **how) for image in images),
            ]
        ),
        context_end=context_end.astype(np.int32),
        **_join_plans(layouts, spec.vision.num_patches, spec.extras),
    )


def _join_plans(layouts: list[ImageLayout], patches: int, extras: Extras) -> dict[str, np.ndarray]:
    """The plans of a sample's pictures one after another, each behind the tiles before it."""
    first_tile = np.cumsum([0, *(each.num_tiles for each in layouts)])[:-1]
    before = first_tile * (patches + extras.pooled)
    index = [each.plan_index + start for each, start in zip(layouts, before, strict=True)]
    none = np.zeros((0, READS))
    stacks = {}
    if extras.stacks:
        empty = np.zeros((extras.stacks, 0, patches, READS))
        stack_index = [
            each.stack_index[:, None] + start for each, start in zip(layouts, before, strict=True)
        ]
        stack_weight = [each.stack_weight[:, None] for each in layouts]
        stacks = {
            "stack_index": np.concatenate([empty, *stack_index], 1).astype(np.int32),
            "stack_weight": np.concatenate([empty, *stack_weight], 1).astype(np.float32),
        }
    return stacks | {
        "plan_index": np.concatenate([none.astype(np.int32), *index]).astype(np.int32),
        "plan_weight": np.concatenate(
            [none.astype(np.float32), *(each.plan_weight for each in layouts)]
        ),
        "visual_newline": np.concatenate([np.zeros(0, bool), *(each.newline for each in layouts)]),
    }
