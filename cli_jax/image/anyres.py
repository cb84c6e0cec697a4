"""Any-resolution layout: from a picture's size alone to tiles, tokens and the gather plan.

Stitching tiles, cutting the padding, bilinear down-interpolation and newline columns are linear
and known from (width, height). So the host says once, per visual token, which patches it reads
with which weights, and the device needs one gather and one weighted sum (docs/method.md section
0). Everything is done in Python's float64, because the references do it there: the rounding below
is the reference's own, oddities included, and decides how many tokens a picture has.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal, NamedTuple

import numpy as np

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image.errors import ImageError
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.image.grid import READS, lerp, read_grid, select_best_resolution
from cli_jax.image.stacks import square_side, stack_grid, stack_plan

DOWNSCALE_ABOVE = 1.1  # the reference tolerates 1.1 x (per side) more tokens than the maximum


class Treatment(NamedTuple):
    """How a picture is treated: `max_tiles` is the N of `anyres_max_N`, None without a maximum."""

    kind: str  # anyres, square, pad, crop or pad_newline
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ImageLayout:
    """What one picture becomes; p visual tokens out of num_tiles * (N + E) features.

    Tiles: the base view, then the `grid` row by row. Tokens: the base view's patches, then, row by
    row, the high-resolution tokens with one newline after each row, then the E pooled ones.

    num_tiles    M tiles of this picture: 1 + grid rows * grid columns
    plan_index   int32   [p, 4]  features read: tile*(N+E) + row*g + column, and the E pooled ones
                                 of the base view, N..N+E-1
    plan_weight  float32 [p, 4]  their weights, summing to 1; 0 for newlines; no patch has weight
                                 twice in one token
    newline      bool    [p]     the token is an image_newline
    stack_index, stack_weight  [m, N, 4]  the same for the stacks on the base view's tokens
    grid         (rows, columns) of high-resolution tiles; (0, 0) if there is only the base view
    unpadded     (rows, columns) of patches left of that grid when the padding is cut
    out          (rows, columns) of high-resolution tokens, newlines not counted
    """

    num_tiles: int
    plan_index: np.ndarray
    plan_weight: np.ndarray
    newline: np.ndarray
    stack_index: np.ndarray
    stack_weight: np.ndarray
    grid: tuple[int, int] = (0, 0)
    unpadded: tuple[int, int] = (0, 0)
    out: tuple[int, int] = (0, 0)

    @property
    def num_tokens(self) -> int:
        return len(self.newline)


def treatment(image: ImageConfig, *, single: bool) -> Treatment:
    """Reads the config's strings; `single` = the sample has one picture.

    Raises ValueError for an unknown `aspect_ratio`.
    """
    if not single and image.multi_image == "pad_newline":
        return Treatment("pad_newline")
    name = image.aspect_ratio
    if name in ("anyres", "square", "pad", "crop"):
        return Treatment(name)
    if match := re.fullmatch(r"anyres_max_([1-9]\d*)", name):
        return Treatment("anyres", int(match[1]))
    raise ValueError(
        f"image.aspect_ratio is {name!r}: use anyres_max_N (N >= 1), anyres, square, pad or crop"
    )


def tile_grid(width: int, height: int, image: ImageConfig, vision: VisionConfig) -> tuple[int, int]:
    """(rows, columns) of the high-resolution tiles of a picture under `anyres`.

    Raises ImageError for an empty picture and ValueError for pinpoints that tiles cannot fill.
    """
    if width < 1 or height < 1:
        raise ImageError(f"the picture is empty: {width} x {height} pixels")
    size = vision.image_size
    best_height, best_width = select_best_resolution(width, height, image.grid_pinpoints)
    if best_height % size or best_width % size:
        raise ValueError(
            f"image.grid_pinpoints has {(best_height, best_width)}: both sides must be multiples "
            f"of vision.image_size = {size}"
        )
    return best_height // size, best_width // size


def unpad(
    width: int, height: int, rows: int, columns: int, rounding: Literal["hf", "original"]
) -> tuple[slice, slice]:
    """The (rows, columns) of a rows x columns patch grid that hold picture and not padding.

    Padding is cut alike on both sides, so an odd remainder keeps one row or column too many.
    """

    def resized(side: int, scale: float) -> int:
        return int(side * scale) if rounding == "original" else int(round(side * scale, 7))

    if width / height > columns / rows:
        cut = (rows - resized(height, columns / width)) // 2
        return slice(cut, rows - cut), slice(0, columns)
    cut = (columns - resized(width, rows / height)) // 2
    return slice(0, rows), slice(cut, columns - cut)


def token_grid(rows: int, columns: int, patches: int, max_tiles: int | None) -> tuple[int, int]:
    """(rows, columns) of tokens for an unpadded patch grid; `patches` is N.

    Raises ImageError where the reference would interpolate to nothing.
    """
    if max_tiles is None:
        return rows, columns
    times = math.sqrt(rows * columns / (max_tiles * patches))
    if times <= DOWNSCALE_ABOVE:
        return rows, columns
    # Float floor division, as in the reference: 50 // times is 44 where floor(50 / times) is 45.
    out = int(rows // times), int(columns // times)
    if 0 in out:
        raise ImageError(
            f"the picture is too elongated: {rows} x {columns} patches shrink to {out}"
        )
    return out


def layout_size(
    width: int,
    height: int,
    image: ImageConfig,
    vision: VisionConfig,
    *,
    single: bool,
    extras: Extras = NO_EXTRAS,
) -> tuple[int, int]:
    """(tiles, tokens) of the picture's `layout`, which is not made; raises as it does."""
    how = treatment(image, single=single)
    tokens = vision.num_patches + extras.pooled
    if how.kind != "anyres":
        end = _newlines(width, height, how)
        rows, columns = one_tile_grid(width, height, how, vision, extras)
        return 1 + rows * columns, tokens + end
    (rows, columns), _, (out_rows, out_columns) = _high_resolution(
        width, height, image, vision, how.max_tiles
    )
    return 1 + rows * columns, tokens + out_rows * (out_columns + 1)


def one_tile_grid(
    width: int, height: int, how: Treatment, vision: VisionConfig, extras: Extras
) -> tuple[int, int]:
    """(rows, columns) of the tiles that stacks add to a picture whose tokens read one tile only.

    None to those of a sample with several pictures (`pad_newline`), which are meant to be cheap.
    """
    if not extras.stacks or how.kind == "pad_newline":
        return 0, 0
    return stack_grid(width, height, vision, extras.stacks)


def _newlines(width: int, height: int, how: Treatment) -> int:
    """Newlines of a picture that is one tile; ImageError if it is empty."""
    if width < 1 or height < 1:
        raise ImageError(f"the picture is empty: {width} x {height} pixels")
    return 1 if how.kind == "pad_newline" else 0  # OneVision: one newline per picture


def _high_resolution(
    width: int, height: int, image: ImageConfig, vision: VisionConfig, max_tiles: int | None
) -> tuple[tuple[int, int], tuple[slice, slice], tuple[int, int]]:
    """Under `anyres`: the tile grid, the rows and columns of its patches in use, the token grid."""
    grid = tile_grid(width, height, image, vision)
    rows, columns = unpad(
        width, height, grid[0] * vision.grid, grid[1] * vision.grid, image.rounding
    )
    unpadded = rows.stop - rows.start, columns.stop - columns.start
    return grid, (rows, columns), token_grid(*unpadded, vision.num_patches, max_tiles)


def layout(
    width: int,
    height: int,
    image: ImageConfig,
    vision: VisionConfig,
    *,
    single: bool,
    extras: Extras = NO_EXTRAS,
) -> ImageLayout:
    """Tiles, tokens and gather plan of a picture of `width` x `height` pixels.

    `single`: the sample has one picture. Matches the packing in LLaVA-NeXT's `llava_arch.py`
    (rounding "original") and Hugging Face's `pack_image_features` (rounding "hf"). Raises
    ImageError for a picture without a layout and ValueError for an unusable config.
    """
    how = treatment(image, single=single)
    stride = vision.num_patches + extras.pooled
    base = np.arange(stride)  # features of the base view: its patches, then what is pooled of them
    patches, pooled = (_copied(part) for part in np.split(base, [vision.num_patches]))
    if how.kind != "anyres":
        end = _newlines(width, height, how)
        index, weight = np.zeros((end, READS), np.int32), np.zeros((end, READS), np.float32)
        newline = np.ones(end, bool)
        grid = sampled = one_tile_grid(width, height, how, vision, extras)
        unpadded = out = (0, 0)
    else:
        grid, (rows, columns), out = _high_resolution(width, height, image, vision, how.max_tiles)
        unpadded = rows.stop - rows.start, columns.stop - columns.start
        lines = [
            (source + cut.start, weight)
            for cut, (source, weight) in zip((rows, columns), map(lerp, unpadded, out), strict=True)
        ]
        plan = read_grid(lines[0], lines[1], grid[1], vision.grid, stride)
        at_row_ends = (0, 0), (0, 1), (0, 0)
        index, weight = (np.pad(part, at_row_ends).reshape(-1, READS) for part in plan)
        newline = np.tile(np.arange(out[1] + 1) == out[1], out[0])
        sampled = (square_side(extras.stacks),) * 2
    stack_index, stack_weight = stack_plan(grid, sampled, vision, extras.stacks, stride)
    return ImageLayout(
        num_tiles=1 + grid[0] * grid[1],
        plan_index=np.concatenate([patches[0], index, pooled[0]]),
        plan_weight=np.concatenate([patches[1], weight, pooled[1]]),
        newline=np.concatenate(
            [np.zeros(vision.num_patches, bool), newline, np.zeros(extras.pooled, bool)]
        ),
        stack_index=stack_index,
        stack_weight=stack_weight,
        grid=grid,
        unpadded=unpadded,
        out=out,
    )


def _copied(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plan (index, weight) of tokens that are a feature each."""
    index = np.repeat(features.astype(np.int32)[:, None], READS, 1)
    weight = np.zeros((len(features), READS), np.float32)
    weight[:, 0] = 1.0
    return index, weight


def plan_inverse(
    plan_index: np.ndarray, plan_weight: np.ndarray, num_patches: int, reads: int = READS
) -> np.ndarray:
    """For every patch the entries of the plan that read it, so that its gradient is a gather.

    plan_index int32 [p, 4] and plan_weight float32 [p, 4] -> int32 [num_patches, reads] of entries
    slot*4 + c with non-zero weight, in ascending order, filled up with p*4 = none. Raises
    ValueError if a patch is read more often than `reads` times or lies outside 0..num_patches-1.
    """
    entries = np.flatnonzero(plan_weight)
    patches = plan_index.ravel()[entries]
    if len(patches) and not 0 <= patches.min() <= patches.max() < num_patches:
        raise ValueError(
            f"the plan reads patches {patches.min()}..{patches.max()} of {num_patches}"
        )
    counts = np.bincount(patches, minlength=num_patches)
    if counts.max(initial=0) > reads:
        raise ValueError(
            f"patch {counts.argmax()} is read {counts.max()} times; a plan may read it {reads} "
            "times"
        )
    order = np.argsort(patches, kind="stable")
    patches = patches[order]
    rank = np.arange(len(patches)) - (np.cumsum(counts) - counts)[patches]
    inverse = np.full((num_patches, reads), plan_weight.size, np.int32)
    inverse[patches, rank] = entries[order]
    return inverse
