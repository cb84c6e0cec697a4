"""What a run minimizes: which model it builds, and the loss of a batch as sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from cli_jax.experiment import ConfigError, Experiment
from cli_jax.model import vlm
from cli_jax.model.attention import kernel_for
from cli_jax.pretrain.loss import pair_sums
from cli_jax.pretrain.towers import TwoTowers
from cli_jax.train.loss import LossSums, loss_sums
from cli_jax.train.state import Params

Batch = dict[str, jax.Array]


class Objective(NamedTuple):
    """build(experiment, platform) -> model; sums(experiment, model, params, batch) -> LossSums."""

    build: Callable[[Experiment, str], nn.Module]
    sums: Callable[[Experiment, nn.Module, Params, Batch], LossSums]


def of(experiment: Experiment) -> Objective:
    """The objective that `config.objective` names."""
    return OBJECTIVES[experiment.objective]


def _build_vlm(experiment: Experiment, platform: str) -> nn.Module:
    return vlm.build(experiment.model, experiment.compute, platform)


def _next_token(experiment: Experiment, model: nn.Module, params: Params, batch: Batch) -> LossSums:
    apply: Any = model.apply
    output = apply({"params": params}, batch)
    hidden, positions = output.scored or (output.hidden, None)
    return loss_sums(
        hidden,
        batch["labels"],
        batch["segment_ids"],
        lambda hidden: apply({"params": params}, hidden, method="logits"),
        average=experiment.optimizer.loss_average,
        chunk=experiment.compute.loss_chunk,
        positions_BxR=positions,
    )


def _build_towers(experiment: Experiment, platform: str) -> nn.Module:
    data = experiment.data
    for key, value, needed in (
        ("data.template", data.template, "plain"),
        ("data.pack", data.pack, False),
        ("optimizer.accumulate", experiment.optimizer.accumulate, 1),
    ):
        if value != needed:
            raise ConfigError(
                f"config.objective=siglip compares whole rows of a batch, one caption each: "
                f"config.{key}={value} must be {needed}"
            )
    compute = experiment.compute
    kernel: Any = kernel_for(compute.attention, platform, compute.dtype)
    return TwoTowers(experiment.model, dataclasses.replace(compute, attention=kernel))


def _pairs(experiment: Experiment, model: nn.Module, params: Params, batch: Batch) -> LossSums:
    apply: Any = model.apply
    found = apply({"params": params}, batch)
    return pair_sums(found.logits, found.same, found.used)


OBJECTIVES = {
    "next_token": Objective(_build_vlm, _next_token),
    "siglip": Objective(_build_towers, _pairs),
}
