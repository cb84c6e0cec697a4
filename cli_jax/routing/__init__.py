"""Which tokens pass which decoder layers: `config.routing.name`, one routing per file."""

from __future__ import annotations

from cli_jax.config import ModelConfig
from cli_jax.routing.base import Routing
from cli_jax.routing.dpvr import DPVR

ROUTINGS: dict[str, type[Routing]] = {"none": Routing, "dpvr": DPVR}


def of(model: ModelConfig) -> type[Routing]:
    """The routing of a model config."""
    return ROUTINGS[model.routing.name]
