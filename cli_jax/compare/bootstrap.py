"""Two-level paired bootstrap: how far would a difference move with other seeds and scenes?

Questions about one scene (cli_jax/data/parts.py; a picture, or its variants) are right or wrong
together, so scenes are resampled, not questions; and both arms are looked at on the same draw. A
draw takes as many seeds and as many scenes as there are, with replacement, and averages the
per-question differences on the drawn scenes' questions, a scene that is drawn twice counting twice.
The interval is that of the percentiles.

With S seeds a resampled mean varies (S - 1) / S as much as another set of seeds would, and with one
seed not at all: intervals over few seeds are too narrow. No jax here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_CHUNK = 2**22  # numbers that are drawn at once


class Interval(NamedTuple):
    """A mean over seeds and questions, and the bounds of its interval."""

    mean: float
    low: float
    high: float


def interval(
    values_SxQ: np.ndarray, scene_Q: Sequence[str], *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of per-question values over S seeds with its 95% interval.

    values_SxQ: correctness of an arm, or the difference arm - baseline for a paired interval.
    scene_Q: what each question is about. The same input gives the same result.
    """
    values_SxQ = np.asarray(values_SxQ, np.float64)
    S, Q = values_SxQ.shape
    if len(scene_Q) != Q or not Q or not S:
        raise ValueError(f"values {values_SxQ.shape} for {len(scene_Q)} questions' scenes")
    sums_SxG, questions_G = by_scene(values_SxQ, scene_Q)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK // len(questions_G))
    for first in range(0, draws, chunk):
        N = min(chunk, draws - first)
        seeds_NxS, scenes_NxG = resample(rng, N, S), resample(rng, N, len(questions_G))
        # A draw's sum over its seeds and scenes: rows of sums that were drawn, counted.
        total_N = np.einsum("ns,ns->n", seeds_NxS, scenes_NxG @ sums_SxG.T)
        means.append(total_N / (S * (scenes_NxG @ questions_G)))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(float(values_SxQ.mean()), float(low), float(high))


def by_scene(values_SxQ: np.ndarray, scene_Q: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values per seed and scene [S, G], and questions per scene [G]."""
    _, group_Q = np.unique(np.asarray(scene_Q), return_inverse=True)
    sums = [np.bincount(group_Q, weights=values_Q) for values_Q in values_SxQ]
    return np.stack(sums), np.bincount(group_Q).astype(np.float64)


def resample(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """How often each of `size` things is drawn in `size` draws with replacement, [draws, size]."""
    drawn = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * size)
    return counts.reshape(draws, size).astype(np.float64)
