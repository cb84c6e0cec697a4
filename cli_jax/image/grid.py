"""Grids of tiles: choosing one for a picture, and reading its patches by interpolation."""

from __future__ import annotations

import math

import numpy as np

READS = 4  # patches that one token reads at most

Line = tuple[np.ndarray, np.ndarray]  # along one axis, sources [out, 2] and their weights [out, 2]


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


def lerp(size: int, out: int) -> Line:
    """Sources [out, 2] and weights [out, 2] of bilinear interpolation along one axis.

    torch's `interpolate(mode="bilinear", align_corners=False)` without antialiasing; the identity
    if out == size. A source that would be read twice, at the border, gets the whole weight once.
    """
    at = np.maximum((np.arange(out) + 0.5) * (size / out) - 0.5, 0.0) if out else np.zeros(0)
    low = at.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    part = np.where(high == low, 0.0, at - low)
    return np.stack([low, high], -1), np.stack([1.0 - part, part], -1)


def read_grid(
    rows: Line, columns: Line, grid_columns: int, side: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Plan [out rows, out columns, 4], index int32 and weight float32, of an interpolated grid.

    The tiles, `side` x `side` patches each, lie row by row behind the base view, `stride` plan
    entries apart, so a patch's index is a sum over the axes.
    """
    (y, y_weight), (x, x_weight) = rows, columns
    y_index = (1 + y // side * grid_columns) * stride + y % side * side
    x_index = x // side * stride + x % side
    shape = len(y), len(x), READS
    index = y_index[:, None, :, None] + x_index[None, :, None, :]
    weight = y_weight[:, None, :, None] * x_weight[None, :, None, :]
    return index.reshape(shape).astype(np.int32), weight.reshape(shape).astype(np.float32)
