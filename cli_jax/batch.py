"""The batch: the one contract between host and device code. No jax here.

Dimension key, used in the whole code base:
  B rows of a batch        L row length (tokens)       P visual slots of a row
  M tiles of a row         N patches of a tile         I images of a row
  Q text slots of a row, 0 where nothing needs them (routing)
  K tapped vision layers   T injection points          D language width    V vision width
  E pooled features of a tile, m stacks of a picture: 0 but for two strategies (image/extras.py)
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np

IGNORE = -100  # label of a position without loss


class Batch(TypedDict):
    """Packed rows in fixed shapes. Index fields point one past the end for "nothing".

    input_ids       int32   [B, L]     token ids; any valid id at visual positions and padding
    labels          int32   [B, L]     unshifted, IGNORE where there is no loss. The first token of
                                       a sample never carries loss: the step masks it
    segment_ids     int32   [B, L]     1, 2, ... for the samples of a row, 0 for padding
    positions       int32   [B, L]     rotary positions, from 0 in every sample
    pixel_values    uint8   [B, M, H, W, 3]  tiles; padding tiles are zeros
    plan_index      int32   [B, P, 4]  source patches of a visual slot, in 0..M*(N+E)-1: tile*(N+E)
                                       + patch, the pooled features of a tile behind its patches
    plan_weight     float32 [B, P, 4]  their bilinear weights, summing to 1; all 0 for newline and
                                       padding slots. One patch never appears twice with weight
    plan_inverse    int32   [B, M*(N+E), 4]  the plan's inverse: entries slot*4+c of the flattened
                                       [P*4] plan that read this patch with weight; P*4 = none
    visual_newline  bool    [B, P]     the slot is an image_newline
    visual_image    int32   [B, P]     image of the row the slot belongs to (newlines too); I = none
    visual_position int32   [B, P]     position in the row; L = none
    visual_index    int32   [B, L]     visual slot at this position; P = none
    text_position   int32   [B, Q]     row position of a text token (neither visual nor padding), in
                                       order; L = none
    text_index      int32   [B, L]     text slot at this position; Q = none. [B, 0] where Q = 0
    image_segment   int32   [B, I]     segment id of the image's sample; 0 = no image
    context_end     int32   [B, I]     row position e_i: first answer token after the image (method
                                       1, `prompt` context), or the end of the sample if none
    stack_index     int32   [B, m, I, N, 4]  source patches of what `deepstack` adds at the tokens
                                       of image i's base view, its first N
    stack_weight    float32 [B, m, I, N, 4]  their weights, as above; 0 where nothing is added
    stack_inverse   int32   [B, M*(N+E), 4*m]  the inverse of the flattened [m*I*N, 4] stacks
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    pixel_values: np.ndarray
    plan_index: np.ndarray
    plan_weight: np.ndarray
    plan_inverse: np.ndarray
    visual_newline: np.ndarray
    visual_image: np.ndarray
    visual_position: np.ndarray
    visual_index: np.ndarray
    text_position: np.ndarray
    text_index: np.ndarray
    image_segment: np.ndarray
    context_end: np.ndarray
    stack_index: np.ndarray
    stack_weight: np.ndarray
    stack_inverse: np.ndarray


def empty(
    *,
    rows: int,
    length: int,
    visual: int,
    tiles: int,
    images: int,
    tile_size: int,
    patches: int,
    text: int = 0,
    pooled: int = 0,
    stacks: int = 0,
) -> Batch:
    """A batch of padding only, in the given sizes; the shapes above are made here and only here."""
    B, L, P, M, I, Q = rows, length, visual, tiles, images, text
    N, E, m = patches, pooled, stacks

    def full(shape: tuple[int, ...], value: int, dtype: Any = np.int32) -> np.ndarray:
        return np.full(shape, value, dtype)

    return Batch(
        input_ids=full((B, L), 0),
        labels=full((B, L), IGNORE),
        segment_ids=full((B, L), 0),
        positions=full((B, L), 0),
        pixel_values=full((B, M, tile_size, tile_size, 3), 0, np.uint8),
        plan_index=full((B, P, 4), 0),
        plan_weight=full((B, P, 4), 0, np.float32),
        plan_inverse=full((B, M * (N + E), 4), P * 4),
        visual_newline=full((B, P), False, bool),
        visual_image=full((B, P), I),
        visual_position=full((B, P), L),
        visual_index=full((B, L), P),
        text_position=full((B, Q), L),
        text_index=full((B, L if Q else 0), Q),
        image_segment=full((B, I), 0),
        context_end=full((B, I), 0),
        stack_index=full((B, m, I, N, 4), 0),
        stack_weight=full((B, m, I, N, 4), 0, np.float32),
        stack_inverse=full((B, M * (N + E), 4 * m), m * I * N * 4),
    )
