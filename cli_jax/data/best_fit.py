"""Offline packing: which samples share a bin. Best fit decreasing, in all dimensions at once.

Samples are packed in shuffled windows: a bin then mixes samples from everywhere, and the time grows
with the number of windows. Within a window the samples that are largest in their largest dimension
come first, and each goes to the bin that it leaves with the fewest free tokens. The open bins are
searched as arrays: exact where lists of candidates by free tokens are not, since bins that are out
of tiles with many tokens left would fill those.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cli_jax.data.collate import Extent

WINDOW = 16_384  # samples; twice as many fill bins no better


def pack(
    extents: np.ndarray, room: Extent, seed: int, progress: Callable[[int], object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Packs all samples; bin b is order[offsets[b]:offsets[b + 1]] of what it returns.

    Returns offsets [bins + 1] and order [n]. extents [n, dimensions]: what each sample takes of a
    bin, in the order of Extent. `progress` is told how many samples were packed since it was told
    last. Raises ValueError for a sample that exceeds `room`.
    """
    if (extents > np.asarray(room)).any():
        raise ValueError(f"a sample does not fit a bin of {room}")
    shuffled = np.random.default_rng([seed, 1]).permutation(len(extents))
    windows = np.array_split(shuffled, max(-(-len(extents) // WINDOW), 1))
    order = [np.zeros(0, np.int64)]
    counts = [np.zeros(1, np.int64)]
    for window in windows:
        bins = best_fit(extents[window], room)
        order += [window[np.sort(members)] for members in bins]
        counts.append(np.asarray([len(members) for members in bins], np.int64))
        if progress:
            progress(len(window))
    return np.cumsum(np.concatenate(counts)), np.concatenate(order)


def best_fit(extents: np.ndarray, room: Extent) -> list[list[int]]:
    """Bins of sample indices; `extents` [n, dimensions] must each fit `room`."""
    taken = np.asarray(extents, np.int64)
    # A dimension without room takes no part: every sample has 0 of it.
    size = (taken / np.maximum(np.asarray(room), 1)).max(1, initial=0)
    free = np.empty((len(room), len(taken)), np.int64)  # of every open bin
    bins: list[list[int]] = []
    for index in np.argsort(-size, kind="stable").tolist():
        sample, left = taken[index], free[:, : len(bins)]
        fits = left[0] >= sample[0]
        for dimension in range(1, len(room)):
            fits &= left[dimension] >= sample[dimension]
        candidates = np.flatnonzero(fits)
        if len(candidates):
            chosen = int(candidates[left[0, candidates].argmin()])
        else:
            chosen = len(bins)
            bins.append([])
            free[:, chosen] = room
        free[:, chosen] -= sample
        bins[chosen].append(index)
    return bins
