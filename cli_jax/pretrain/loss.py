"""The SigLIP loss: is this caption that picture's? Asked of every pair of a batch by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cli_jax.train.loss import LossSums


def pair_sums(logits_BxB: jax.Array, same_BxB: jax.Array, used_B: jax.Array) -> LossSums:
    """Sigmoid loss of logits [picture, caption], float32, as sums over the batch's pictures.

        loss = - sum_ij log sigmoid(z_ij logits_ij),   z_ij = 1 for i = j, else -1

    and its weight is the number of pictures, so that their quotient is the loss of the SigLIP paper
    (arXiv 2303.15343, equation 1; big_vision's trainers/proj/image_text/siglip.py). Pairs i != j
    with equal captions (`same`) are left out: the paper's formula would call a caption wrong that
    is right. Without such pairs it is the paper's. `used`: false for padding rows. `correct` counts
    the pictures that have no logit above that of their own caption.
    """
    own = jnp.eye(len(used_B), dtype=bool)
    pairs = (own | ~same_BxB) & used_B[:, None] & used_B[None, :]
    log_likelihood = jax.nn.log_sigmoid(jnp.where(own, logits_BxB, -logits_BxB))
    best_other = jnp.max(jnp.where(pairs & ~own, logits_BxB, -jnp.inf), axis=1)
    pictures = jnp.sum(used_B, dtype=jnp.float32)
    return LossSums(
        loss=-jnp.sum(jnp.where(pairs, log_likelihood, 0.0)),
        weight=pictures,
        correct=jnp.sum(used_B & (jnp.diagonal(logits_BxB) >= best_other), dtype=jnp.float32),
        labeled=pictures,
    )
