"""Batched generation with a KV cache: one prefill and one decode loop, in one compiled program.

Vision, AMP and AGF run in prefill only. Decode reads the cache, so a generated token costs the
same with and without injection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.batch import Batch
from cli_jax.generate.sampling import Sampling, choose, request_keys


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one request was answered: token ids without the stop token, and whether it stopped."""

    ids: list[int]
    stopped: bool  # False: cut off at max_new_tokens


class Generator:
    """Answers batches of prompts; every new batch shape compiles once and is counted.

    `compilations` is that count, for reports and tests: keep it small by collating into few
    shapes (`generate.buckets`).
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        stop_ids: Sequence[int],
        pad_id: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> None:
        """`model` and `params` as in `cli_jax.model.vlm`; generation ends at any of `stop_ids`.

        Raises ValueError for a missing stop id or a max_new_tokens below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not stop_ids:
            raise ValueError("stop_ids is empty: generation would never end before its limit")
        self._params = params
        self.compilations = 0

        def run(params: Any, batch: Batch, requests: jax.Array) -> tuple[jax.Array, jax.Array]:
            self.compilations += 1  # the body runs when it is traced, so once per shape
            found = _generate(
                model,
                params,
                batch,
                requests,
                stop_ids=tuple(stop_ids),
                pad_id=pad_id,
                max_new_tokens=max_new_tokens,
                sampling=sampling or Sampling(),
            )
            return everywhere(found)

        self._run = jax.jit(run)

    def __call__(self, batch: Batch, requests: Sequence[int]) -> list[Completion]:
        """Answers the prompts in the first `len(requests)` rows; the rows left over are dropped.

        A row holds one prompt from position 0 on, right-padded (`segment_ids` 1, then 0).
        `requests` are the prompts' numbers in the whole run: they seed the sampling, so a prompt
        gets the same answer in whichever batch it lands.
        """
        rows = batch["segment_ids"].shape[0]
        _check_rows(np.asarray(batch["segment_ids"]), len(requests))
        numbers = np.zeros(rows, np.int32)
        numbers[: len(requests)] = requests
        tokens, lengths = jax.device_get(self._run(self._params, batch, numbers))
        return [
            Completion(
                ids=tokens[row, : lengths[row]].tolist(),
                stopped=bool(lengths[row] < tokens.shape[1]),
            )
            for row in range(len(requests))
        ]


def _generate(
    model: Any,
    params: Any,
    batch: Batch,
    requests: jax.Array,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Token ids [B, max_new_tokens] and the number [B] of them before the stop token.

    The token of step t is fed at cache slot L + t in every row, while its rotary position goes
    on from the row's own prompt length; the slots between a prompt's end and L are never valid.
    """
    batch = split_rows(batch)
    B, L = batch["input_ids"].shape
    S = L + max_new_tokens - 1  # the last token is never fed back, so it needs no slot
    variables = {"params": params}
    length_B = jnp.sum(batch["segment_ids"] > 0, axis=1, dtype=jnp.int32)
    keys = request_keys(sampling.seed, requests)
    slot_S = jnp.arange(S)
    prompt_BS = slot_S < length_B[:, None]

    def pick(hidden_BD: jax.Array, step: jax.Array | int) -> jax.Array:
        logits = model.apply(variables, hidden_BD, method="logits")
        return choose(logits, keys, step, sampling)

    output, cache = model.apply(variables, batch, cache_length=S, method="prefill")
    last = jnp.maximum(length_B - 1, 0)  # a left-over row has no prompt and is never read
    hidden_BD = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
    first = pick(hidden_BD, 0)
    stop = jnp.asarray(stop_ids, jnp.int32)
    # A left-over row counts as stopped from the start: it must not keep the loop running.
    empty = length_B == 0
    stopped = empty | jnp.isin(first, stop)
    tokens = jnp.full((B, max_new_tokens), pad_id, jnp.int32)
    tokens = tokens.at[:, 0].set(jnp.where(empty, pad_id, first))
    count = jnp.where(stopped, 0, 1)

    def unfinished(state: tuple) -> jax.Array:
        step, _, _, stopped, _ = state
        return (step < max_new_tokens) & ~jnp.all(stopped)

    def decode(state: tuple) -> tuple:
        step, tokens, count, stopped, cache = state
        slot = L + step - 1
        hidden_BD, cache = model.apply(
            variables,
            jax.lax.dynamic_index_in_dim(tokens, step - 1, axis=1, keepdims=False),
            length_B + step - 1,
            slot,
            prompt_BS | ((slot_S >= L) & (slot_S <= slot)),
            cache,
            method="decode",
        )
        token = jnp.where(stopped, pad_id, pick(hidden_BD, step))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        stopped |= jnp.isin(token, stop)
        return step + 1, tokens, count + jnp.where(stopped, 0, 1), stopped, cache

    state = (jnp.int32(1), tokens, count, stopped, cache)
    _, tokens, count, _, _ = jax.lax.while_loop(unfinished, decode, state)
    return tokens, count


def split_rows(batch: Any) -> Any:
    """Under a mesh every device takes some of the rows; without one nothing happens."""

    def split(x: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(x, ("batch", *[None] * (x.ndim - 1)))

    return jax.tree.map(split, batch)


def everywhere(results: Any) -> Any:
    """Under a mesh every device gets all of the results, so that any process can read them."""

    def whole(x: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(x, (None,) * x.ndim)

    return jax.tree.map(whole, results)


def _check_rows(segment_ids: np.ndarray, requests: int) -> None:
    """One prompt per row, from the left, without holes; the rows after them empty."""
    rows, length = segment_ids.shape
    if not 0 < requests <= rows:
        raise ValueError(f"{requests} requests for a batch of {rows} rows")
    lengths = (segment_ids > 0).sum(axis=1)
    expected = (np.arange(length) < lengths[:, None]).astype(segment_ids.dtype)
    if not np.array_equal(segment_ids, expected):
        raise ValueError("generation needs one right-padded prompt per row: segment ids 1, then 0")
    if not (lengths[:requests] > 0).all() or lengths[requests:].any():
        raise ValueError(f"the first {requests} rows must hold a prompt, and only they")
