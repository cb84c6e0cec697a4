"""The fusion strategies by name: `config.fusion.name`."""

from __future__ import annotations

from cli_jax.config import ConfigError, ModelConfig
from cli_jax.fusion.adapter import Adapter
from cli_jax.fusion.base import Fusion
from cli_jax.fusion.cli import CLI
from cli_jax.fusion.deepstack import DeepStack
from cli_jax.fusion.dense_connector import DenseConnector
from cli_jax.fusion.layer_concat import LayerConcat
from cli_jax.fusion.mmfuser import MMFuser
from cli_jax.fusion.none import NoFusion
from cli_jax.fusion.sli import SLI

STRATEGIES: dict[str, type[Fusion]] = {
    "none": NoFusion,
    "cli": CLI,
    "deepstack": DeepStack,
    "sli": SLI,
    "layer_concat": LayerConcat,
    "dense_connector": DenseConnector,
    "mmfuser": MMFuser,
    "adapter": Adapter,
}


def get(name: str) -> type[Fusion]:
    """The strategy's class; an unknown name is a ConfigError that lists the known ones."""
    if name not in STRATEGIES:
        raise ConfigError(
            f"config.fusion.name={name!r} is no strategy; known: {sorted(STRATEGIES)}"
        )
    return STRATEGIES[name]


def of(model: ModelConfig) -> type[Fusion]:
    """The strategy of a model config."""
    return get(model.fusion_name)
