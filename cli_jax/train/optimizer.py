"""AdamW or Muon: a learning rate per parameter group, warm-up, cosine decay and clipping.

What is frozen is decided here and nowhere else: a frozen leaf has no rate, is never differentiated
and holds no optimizer state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cli_jax.experiment import ConfigError, OptimizerConfig
from cli_jax.train.state import Params, unflatten

Rates = dict[str, float | None]  # path -> peak learning rate, or None = frozen
MUON_RMS = 0.2  # of an update's elements; about AdamW's, so that both take the same rates


def assign_rates(paths: Iterable[str], config: OptimizerConfig) -> Rates:
    """The peak learning rate of every parameter; the first group that matches its path decides.

    Patterns are matched with `re.fullmatch`. A pattern that decides nothing is an error that names
    it: it is either misspelled or hidden behind an earlier one.
    """
    rates: Rates = {}
    matched = [0] * len(config.groups)
    decided = [0] * len(config.groups)
    patterns = [_compile(group.pattern) for group in config.groups]
    for path in paths:
        hits = [i for i, pattern in enumerate(patterns) if pattern.fullmatch(path)]
        for i in hits:
            matched[i] += 1
        if hits:
            decided[hits[0]] += 1
        rates[path] = config.groups[hits[0]].lr if hits else config.lr
    for group, some, own in zip(config.groups, matched, decided, strict=True):
        where = f"config.optimizer.groups: the pattern {group.pattern!r}"
        if not some:
            examples = ", ".join(sorted({path.split("/")[0] + "/..." for path in rates}))
            raise ConfigError(f"{where} matches no parameter; the paths begin with {examples}")
        if not own:
            raise ConfigError(f"{where} is hidden: earlier patterns take all that it matches")
    if all(rate is None for rate in rates.values()):
        raise ConfigError("config.optimizer.groups freezes every parameter: nothing to train")
    return rates


def trained(rates: Rates) -> dict[str, float]:
    """The rates of the parameters that are not frozen."""
    return {path: rate for path, rate in rates.items() if rate is not None}


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The factor on every rate at update 0, 1, ...: linear warm-up from 0, then cosine to 0.

    Matches transformers' `get_cosine_schedule_with_warmup` with ceil(warmup_ratio * total_steps)
    warm-up steps; `constant` stays at 1 after the warm-up.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)

    def factor(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rise = count / max(1, warmup)
        if config.schedule == "constant":
            return jnp.minimum(rise, 1.0) if warmup else jnp.ones_like(count)
        progress = (count - warmup) / max(1, total_steps - warmup)
        fall = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
        return jnp.where(count < warmup, rise, fall)

    return factor


def make_optimizer(
    config: OptimizerConfig, rates: Mapping[str, float], total_steps: int
) -> optax.GradientTransformation:
    """The optimizer of the trained leaves (`rates` as from `trained`), given as a nested tree.

    The gradient is clipped by its norm over all of them. Weight decay leaves out biases and
    normalization weights, as LLaVA's trainer does. With `muon` the matrices in the layers of tower
    and decoder take orthogonalized momentum (Liu et al. 2025, arXiv:2502.16982, eq. 4), everything
    else stays with Adam.
    """
    factor = schedule(config, total_steps)
    rate_tree = unflatten(rates)
    decayed = unflatten({path: not _is_norm_or_bias(path) for path in rates})
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _direction(config, rates),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_schedule(lambda count: -factor(count)),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rate_tree)),
    )


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Params) -> optax.OptState:
    """A fresh optimizer state; moments are float32 whatever the parameters are."""
    return optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), trainable))


def _direction(config: OptimizerConfig, rates: Mapping[str, float]) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "adamw":
        return adam
    muon = optax.chain(
        scale_by_muon(weight_dimension_numbers=_last_two_axes),
        optax.stateless(lambda updates, _: jax.tree.map(_match_adam, updates)),
    )
    kinds = {path: "muon" if _is_layer_matrix(path) else "adam" for path in rates}
    return optax.partition({"adam": adam, "muon": muon}, unflatten(kinds))


def _last_two_axes(updates: Params) -> Params:
    """A kernel is [layers, in, out]: each layer's matrix is orthogonalized for itself."""
    return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)


def _match_adam(x: jax.Array) -> jax.Array:
    """An orthogonal matrix [in, out] has elements of RMS 1 / sqrt(max(in, out))."""
    return MUON_RMS * math.sqrt(max(x.shape[-2:])) * x


def _is_layer_matrix(path: str) -> bool:
    return "/layers/" in path and path.endswith("/kernel")


def _is_norm_or_bias(path: str) -> bool:
    leaf = path.rsplit("/", 1)[-1]
    return leaf == "scale" or leaf.endswith("bias")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"config.optimizer.groups: {pattern!r} is not a regular expression: {error}"
        ) from None
