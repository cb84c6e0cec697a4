"""A language model without layers whose next token depends on every earlier token and position.

It has the three methods that generation calls. Its hidden state is a sum over the attended slots,
so the expected greedy answer can be computed in numpy from the token list alone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH = 23, 16


class FakeOutput(NamedTuple):
    hidden: jnp.ndarray
    gates: None = None


def make_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embedding": rng.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "phase": rng.uniform(0.5, 2.5, size=WIDTH).astype(np.float32),
        "head": rng.normal(size=(WIDTH, VOCAB)).astype(np.float32),
    }


class FakeModel:
    def apply(self, variables, *args, method: str, **kwargs):
        return getattr(self, "_" + method)(variables["params"], *args, **kwargs)

    def _features(self, params, tokens, positions):
        angle = positions[..., None].astype(jnp.float32) * params["phase"]
        return params["embedding"][tokens] * jnp.cos(angle)

    def _prefill(self, params, batch, *, cache_length):
        features = self._features(params, batch["input_ids"], batch["positions"])
        # Padding rows and slots hold large numbers: whoever attends to them is found out.
        features = jnp.where((batch["segment_ids"] > 0)[..., None], features, 100.0)
        extra = cache_length - features.shape[1]
        cache = jnp.pad(features, ((0, 0), (0, extra), (0, 0)), constant_values=100.0)
        return FakeOutput(jnp.sin(jnp.cumsum(features, axis=1))), cache

    def _decode(self, params, tokens, positions, slot, valid, cache):
        cache = cache.at[:, slot].set(self._features(params, tokens, positions))
        attended = jnp.where(valid[..., None], cache, 0.0)
        return jnp.sin(attended.sum(axis=1)), cache

    def _logits(self, params, hidden):
        return 4 * hidden @ params["head"]


def next_logits(params, tokens: list[int]) -> np.ndarray:
    """The definition in numpy: logits [VOCAB] after the given tokens."""
    angle = np.arange(len(tokens))[:, None] * params["phase"]
    features = params["embedding"][tokens] * np.cos(angle)
    return 4 * np.sin(features.sum(axis=0)) @ params["head"]


def greedy(params, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(next_logits(params, tokens).argmax()))
    return tokens[len(prompt) :]
