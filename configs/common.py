"""What the configs share: every setting at its default, and the recipes they are made of."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict, FieldReference

from cli_jax.config import ImageConfig, RoutingConfig, TextConfig, VisionConfig
from cli_jax.experiment import Experiment
from cli_jax.fusion.registry import STRATEGIES

VISION_TOWER = "vision_tower/.*"
CONNECTOR = "(multi_modal_projector|fusion)/.*"  # all between tower and decoder
GATES = "fusion/agf/.*"  # AGF of `cli`
FUSION = "fusion/.*"  # what a strategy adds: AMP and AGF for `cli`
ROUTING = "routing/.*"  # what a routing adds: the side branch of `dpvr`
EVERYTHING = ".*"


def base() -> ConfigDict:
    """Every setting of a run at the default of its dataclass; `name` has none."""
    hints = typing.get_type_hints(Experiment)
    sections = {
        field.name: _defaults(hints[field.name])
        for field in dataclasses.fields(Experiment)
        if dataclasses.is_dataclass(hints[field.name]) and field.name != "model"
    }
    scalars = {
        field.name: field.default
        for field in dataclasses.fields(Experiment)
        if field.default is not dataclasses.MISSING
    }
    model = {
        "vision": _defaults(VisionConfig),
        "text": _defaults(TextConfig),
        "image": _defaults(ImageConfig),
        "has_newline": True,
        "projector_width": 0,
    }
    fusion = {"name": "none"}
    fusion |= {name: _defaults(strategy.Config) for name, strategy in STRATEGIES.items()}
    shared = {"model": model, "fusion": fusion, "routing": _defaults(RoutingConfig)}
    return ConfigDict({"name": "", **shared, **sections, **scalars})


def set_model(
    config: ConfigDict, vision: dict[str, Any], text: dict[str, Any], image: dict[str, Any]
) -> None:
    """Takes the three sections of a model, e.g. from `models.py`."""
    config.model.vision.update(vision)
    config.model.text.update(text)
    config.model.image.update(image)


def source(path: str, **settings: Any) -> dict[str, Any]:
    """One file of `data.train`: a path below `data.root`, and other fields of SourceConfig."""
    return {"path": path, **settings}


def group(pattern: str, lr: float | None) -> dict[str, Any]:
    """One entry of `optimizer.groups`: a learning rate, or None = frozen."""
    return {"pattern": pattern, "lr": lr}


def train_only(*patterns: str, lr: float) -> tuple[dict[str, Any], ...]:
    """Groups that train what the patterns match and freeze everything else."""
    return (*(group(pattern, lr) for pattern in patterns), group(EVERYTHING, None))


def _defaults(cls: Any) -> dict[str, Any]:
    """A dataclass' defaults; a field of several types takes values of any of them later on."""
    hints = typing.get_type_hints(cls)
    values = dataclasses.asdict(cls())
    for name, value in values.items():
        if typing.get_origin(hints[name]) in (typing.Union, types.UnionType):
            values[name] = FieldReference(value, field_type=object)
    return values
