"""DeepStack's stacks: which high-resolution patches are added at which token of the base view.

The patches of a picture's high-resolution tiles form a grid L. Stack k holds every a-th row and
b-th column of it, S_k = L[i::a, j::b] with k = i*b + j, so that each stack is as large as the base
view and its patches lie where the base view's do (DeepStack-VL, `deepstack_arch.py`).
"""

from __future__ import annotations

import math

import numpy as np

from cli_jax.config import VisionConfig
from cli_jax.image.grid import READS, lerp, read_grid, select_best_resolution


def stack_grid(width: int, height: int, vision: VisionConfig, stacks: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that a picture without any-resolution tiles gets for its stacks.

    All grids of at most `stacks` tiles but a single one, in the order of DeepStack-VL's
    `process_anyres_image`. Raises ValueError if there are none.
    """
    size = vision.image_size
    pinpoints = tuple(
        (rows * size, columns * size)
        for columns in range(1, stacks + 1)
        for rows in range(1, stacks // columns + 1)
        if rows * columns > 1
    )
    if not pinpoints:
        raise ValueError(f"{stacks} stacks: a picture of one tile needs 2 or more")
    best_height, best_width = select_best_resolution(width, height, pinpoints)
    return best_height // size, best_width // size


def square_side(stacks: int) -> int:
    """s with s*s = `stacks`: under any-resolution every grid is resampled to s*g x s*g patches."""
    side = math.isqrt(stacks)
    if side * side != stacks:
        raise ValueError(f"{stacks} stacks: any-resolution pictures need a square, such as 4 or 9")
    return side


def stack_plan(
    grid: tuple[int, int], sampled: tuple[int, int], vision: VisionConfig, stacks: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Index int32 and weight float32 [stacks, N, 4] of the stacks of a `grid` of tiles.

    The grid's patches are resampled to (a*g, b*g), (a, b) = `sampled`, bilinearly as in `lerp`, and
    dealt to the first a*b stacks; the others are empty. Without a grid all are. No patch is read
    more than 4 * a*b times.
    """
    g, (a, b) = vision.grid, sampled
    index = np.zeros((stacks, vision.num_patches, READS), np.int32)
    weight = np.zeros(index.shape, np.float32)
    if 0 not in grid:
        plan = read_grid(lerp(grid[0] * g, a * g), lerp(grid[1] * g, b * g), grid[1], g, stride)
        for part, whole in zip((index, weight), plan, strict=True):
            dealt = whole.reshape(g, a, g, b, READS).transpose(1, 3, 0, 2, 4)
            part[: a * b] = dealt.reshape(a * b, g * g, READS)
    return index, weight
