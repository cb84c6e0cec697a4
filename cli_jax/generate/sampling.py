"""Choosing the next token: greedy, or sampled with temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; applied in the order temperature, top_k, top_p.

    temperature: 0 takes the most likely token and ignores everything below.
    top_k: only the k most likely tokens are candidates; 0 = all.
    top_p: only the most likely tokens that together reach this probability; 1 = all.
    seed: two runs with one seed give the same tokens, whatever the batch size.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or larger, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or larger, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def request_keys(seed: int, requests: jax.Array) -> jax.Array:
    """One random key per request number [B]: the neighbors in the batch play no part."""
    return jax.vmap(lambda request: jax.random.fold_in(jax.random.key(seed), request))(requests)


def candidates(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Scales float32 logits [B, vocab] and sets those that may not be drawn to -inf.

    Tokens that tie with the last candidate stay in, so the result does not depend on sort order.
    """
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        keep = before < sampling.top_p  # the most likely token has nothing before it: always in
        smallest = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def choose(
    logits: jax.Array, keys: jax.Array, step: jax.Array | int, sampling: Sampling
) -> jax.Array:
    """Next token ids int32 [B] from float32 logits [B, vocab].

    `keys` [B] come from `request_keys`; `step` is the index of the new token, so that every token
    of a request has its own randomness and nothing random is carried.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    drawn = jax.vmap(jax.random.categorical)(step_keys, candidates(logits, sampling))
    return drawn.astype(jnp.int32)
