"""The masked next-token loss, as sums: numerators and denominators that add up over microbatches.

Keeping sums apart from their division is what makes gradient accumulation exact: every microbatch
adds to the numerator, and the batch divides once by the weight of all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from cli_jax.batch import IGNORE

Logits = Callable[[jax.Array], jax.Array]


class LossSums(NamedTuple):
    """float32 scalars: weighted loss, its weight, right first guesses, and labeled tokens."""

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    labeled: jax.Array


def next_token_targets(labels_BxL: jax.Array, segment_ids_BxL: jax.Array) -> jax.Array:
    """Targets [B, L]: the label of the next position, IGNORE where that is another sample.

    So the first token of a sample never carries loss, and the last position of a row has none.
    """
    following = jnp.roll(labels_BxL, -1, axis=1)
    same = (jnp.roll(segment_ids_BxL, -1, axis=1) == segment_ids_BxL) & (segment_ids_BxL > 0)
    same = same.at[:, -1].set(False)
    return jnp.where(same, following, IGNORE)


def target_weights(
    targets_BxL: jax.Array, segment_ids_BxL: jax.Array, average: Literal["tokens", "samples"]
) -> jax.Array:
    """float32 [B, L] weight of every target; its sum is what the loss is divided by.

    `tokens`: 1 each, so every labeled token of the batch counts alike. `samples`: 1 over the number
    of targets of the sample, so every sample that has any counts alike (the mean of per-sample
    means of LLaVA's batch-size-one recipe).
    """
    valid = targets_BxL != IGNORE
    if average == "tokens":
        return valid.astype(jnp.float32)

    def per_row(valid_L: jax.Array, segment_L: jax.Array) -> jax.Array:
        counts = jnp.zeros(len(segment_L) + 1, jnp.int32).at[segment_L].add(valid_L)
        return jnp.where(valid_L, 1.0 / jnp.maximum(counts[segment_L], 1), 0.0)

    return jax.vmap(per_row)(valid, segment_ids_BxL)


def loss_sums(
    hidden_BxLxD: jax.Array,
    labels_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    logits: Logits,
    *,
    average: Literal["tokens", "samples"],
    chunk: int = 0,
    positions_BxR: jax.Array | None = None,
) -> LossSums:
    """Cross-entropy of the next tokens given final hidden states and the head.

    `logits` maps hidden [B, l, D] to float32 [B, l, vocab]. With `chunk` > 0 the head runs on that
    many positions of every row at a time, forward and backward, so the logits of a whole row never
    exist; the result is the same up to the order of the sum.

    `positions`: hidden states [B, R, D] are of these positions of the row only (L = none); targets
    of other positions carry no loss and no weight.
    """
    targets = next_token_targets(labels_BxL, segment_ids_BxL)
    if positions_BxR is not None:
        targets = _at(targets, positions_BxR, IGNORE)
        segment_ids_BxL = _at(segment_ids_BxL, positions_BxR, 0)
    weights = target_weights(targets, segment_ids_BxL, average)

    def piece(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> LossSums:
        return _sums(logits(hidden), targets, weights)

    length = hidden_BxLxD.shape[1]
    if chunk == 0 or chunk >= length:
        return piece(hidden_BxLxD, targets, weights)

    count = -(-length // chunk)

    def split(x: jax.Array, fill: int) -> jax.Array:
        """[B, L, ...] -> [count, B, chunk, ...]"""
        pad = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    pieces = (split(hidden_BxLxD, 0), split(targets, IGNORE), split(weights, 0))
    remat = jax.checkpoint(piece, prevent_cse=False)

    def add(total: LossSums, xs: tuple[jax.Array, jax.Array, jax.Array]):
        return jax.tree.map(jnp.add, total, remat(*xs)), None

    zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
    return jax.lax.scan(add, zero, pieces)[0]


def _at(x_BxL: jax.Array, positions_BxR: jax.Array, none: int) -> jax.Array:
    return jnp.take_along_axis(x_BxL, positions_BxR, axis=1, mode="fill", fill_value=none)


def _sums(logits_BxLxX: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array) -> LossSums:
    valid = targets_BxL != IGNORE
    # A comparison instead of a gather: its backward pass is a select, not a scatter, and it needs
    # no communication when the vocabulary is split over devices.
    is_target = jnp.arange(logits_BxLxX.shape[-1]) == targets_BxL[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits_BxLxX, 0), axis=-1)
    top = jnp.max(jax.lax.stop_gradient(logits_BxLxX), axis=-1)
    log_normalizer = jnp.log(jnp.sum(jnp.exp(logits_BxLxX - top[..., None]), axis=-1)) + top
    cross_entropy = jnp.where(valid, log_normalizer - target_logit, 0)
    return LossSums(
        loss=jnp.sum(cross_entropy * weights_BxL),
        weight=jnp.sum(weights_BxL),
        correct=jnp.sum(valid & (target_logit >= top), dtype=jnp.float32),
        labeled=jnp.sum(valid, dtype=jnp.float32),
    )
