"""The fusion strategies by name: `config.fusion.name`."""

from __future__ import annotations

from cli_jax.config import ModelConfig
from cli_jax.fusion.base import Fusion
from cli_jax.fusion.cli import CLI
from cli_jax.fusion.deepstack import DeepStack
from cli_jax.fusion.dense_connector import DenseConnector
from cli_jax.fusion.none import NoFusion

STRATEGIES: dict[str, type[Fusion]] = {
    "none": NoFusion,
    "deepstack": DeepStack,
    "dense_connector": DenseConnector,
    "cli": CLI,
}


def get(name: str) -> type[Fusion]:
    """The strategy's class; an unknown name is an error that lists the known ones."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown fusion strategy {name!r}; known: {sorted(STRATEGIES)}")
    return STRATEGIES[name]


def of(model: ModelConfig) -> type[Fusion]:
    """The strategy of a model config."""
    return get(model.fusion_name)
