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

READS = 4  # patches that one token reads at most, and tokens that read one patch at most
DOWNSCALE_ABOVE = 1.1  # the reference tolerates 1.1 x (per side) more tokens than the maximum


class Treatment(NamedTuple):
    """How a picture is treated: `max_tiles` is the N of `anyres_max_N`, None without a maximum."""

    kind: str  # anyres, square, pad, crop or pad_newline
    max_tiles: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ImageLayout:
    """What one picture becomes; p visual tokens out of num_tiles * N patches.

    Tiles: the base view, then the `grid` row by row. Tokens: the base view's patches, then, row by
    row, the high-resolution tokens with one newline after each row.

    num_tiles    M tiles of this picture: 1 + grid rows * grid columns
    plan_index   int32   [p, 4]  patches read: tile*N + row*g + column
    plan_weight  float32 [p, 4]  their weights, summing to 1; 0 for newlines; no patch has weight
                                 twice in one token
    newline      bool    [p]     the token is an image_newline
    grid         (rows, columns) of high-resolution tiles; (0, 0) if there is only the base view
    unpadded     (rows, columns) of patches left of that grid when the padding is cut
    out          (rows, columns) of high-resolution tokens, newlines not counted
    """

    num_tiles: int
    plan_index: np.ndarray
    plan_weight: np.ndarray
    newline: np.ndarray
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


def select_best_resolution(
    width: int, height: int, pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """The (height, width) of the pinpoint that keeps most pixels, then wastes least, then is first.

    `pinpoints` are (height, width). LLaVA-NeXT's own scripts list (width, height): swap each pair
    of an asymmetric list, keeping its order.
    """
    best, best_kept, best_waste = None, 0, math.inf
    for target_height, target_width in pinpoints:
        scale = min(target_width / width, target_height / height)
        # An enlarged picture keeps no more pixels than it has.
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = target_width * target_height - kept
        if kept > best_kept or (kept == best_kept and waste < best_waste):
            best, best_kept, best_waste = (target_height, target_width), kept, waste
    if best is None:
        raise ValueError("image.grid_pinpoints is empty: anyres needs (height, width) pairs")
    return best


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


def _lerp(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources [out, 2] and weights [out, 2] of bilinear interpolation along one axis.

    torch's `interpolate(mode="bilinear", align_corners=False)` without antialiasing; the identity
    if out == size. A source that would be read twice, at the border, gets the whole weight once.
    """
    at = np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0.0) if out else np.zeros(0)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    part = np.where(high == low, 0.0, at - low)
    return np.stack([low, high], -1), np.stack([1.0 - part, part], -1)


def layout_size(
    width: int, height: int, image: ImageConfig, vision: VisionConfig, *, single: bool
) -> tuple[int, int]:
    """(tiles, tokens) of the picture's `layout`, which is not made; raises as it does."""
    how = treatment(image, single=single)
    if how.kind != "anyres":
        return 1, vision.num_patches + _newlines(width, height, how)
    (rows, columns), _, (out_rows, out_columns) = _high_resolution(
        width, height, image, vision, how.max_tiles
    )
    return 1 + rows * columns, vision.num_patches + out_rows * (out_columns + 1)


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
    width: int, height: int, image: ImageConfig, vision: VisionConfig, *, single: bool
) -> ImageLayout:
    """Tiles, tokens and gather plan of a picture of `width` x `height` pixels.

    `single`: the sample has one picture. Matches the packing in LLaVA-NeXT's `llava_arch.py`
    (rounding "original") and Hugging Face's `pack_image_features` (rounding "hf"). Raises
    ImageError for a picture without a layout and ValueError for an unusable config.
    """
    how = treatment(image, single=single)
    g, N = vision.grid, vision.num_patches
    base_index = np.repeat(np.arange(N, dtype=np.int32)[:, None], READS, 1)
    base_weight = np.zeros((N, READS), np.float32)
    base_weight[:, 0] = 1.0
    if how.kind != "anyres":
        end = _newlines(width, height, how)
        return ImageLayout(
            num_tiles=1,
            plan_index=np.pad(base_index, ((0, end), (0, 0))),
            plan_weight=np.pad(base_weight, ((0, end), (0, 0))),
            newline=np.arange(N + end) >= N,
        )

    grid, (rows, columns), out = _high_resolution(width, height, image, vision, how.max_tiles)
    (grid_rows, grid_columns), (out_rows, out_columns) = grid, out
    unpadded = rows.stop - rows.start, columns.stop - columns.start
    y, y_weight = _lerp(unpadded[0], out_rows)
    x, x_weight = _lerp(unpadded[1], out_columns)
    y, x = y + rows.start, x + columns.start
    # A patch's index is a sum over the axes: tile*N + row*g + column, where tile counts row-major
    # behind the base view.
    y_index = (1 + y // g * grid_columns) * N + y % g * g
    x_index = x // g * N + x % g

    shape = out_rows, out_columns + 1, READS  # the last column is the newline
    index, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    corners = out_rows, out_columns, READS
    index[:, :-1] = (y_index[:, None, :, None] + x_index[None, :, None, :]).reshape(corners)
    weight[:, :-1] = (y_weight[:, None, :, None] * x_weight[None, :, None, :]).reshape(corners)
    newline = np.zeros(shape[:2], bool)
    newline[:, -1] = True
    return ImageLayout(
        num_tiles=1 + grid_rows * grid_columns,
        plan_index=np.concatenate([base_index, index.reshape(-1, READS)]),
        plan_weight=np.concatenate([base_weight, weight.reshape(-1, READS)]),
        newline=np.concatenate([np.zeros(N, bool), newline.ravel()]),
        grid=grid,
        unpadded=unpadded,
        out=out,
    )


def plan_inverse(plan_index: np.ndarray, plan_weight: np.ndarray, num_patches: int) -> np.ndarray:
    """For every patch the entries of the plan that read it, so that its gradient is a gather.

    plan_index int32 [p, 4] and plan_weight float32 [p, 4] -> int32 [num_patches, 4] of entries
    slot*4 + c with non-zero weight, in ascending order, filled up with p*4 = none. Raises
    ValueError if a patch is read more often than 4 times or lies outside 0..num_patches-1.
    """
    entries = np.flatnonzero(plan_weight)
    patches = plan_index.ravel()[entries]
    if len(patches) and not 0 <= patches.min() <= patches.max() < num_patches:
        raise ValueError(
            f"the plan reads patches {patches.min()}..{patches.max()} of {num_patches}"
        )
    reads = np.bincount(patches, minlength=num_patches)
    if reads.max(initial=0) > READS:
        raise ValueError(
            f"patch {reads.argmax()} is read {reads.max()} times; a plan may read it {READS} times"
        )
    order = np.argsort(patches, kind="stable")
    patches = patches[order]
    rank = np.arange(len(patches)) - (np.cumsum(reads) - reads)[patches]
    inverse = np.full((num_patches, READS), plan_weight.size, np.int32)
    inverse[patches, rank] = entries[order]
    return inverse
