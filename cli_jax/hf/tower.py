"""A vision tower by itself, out of whatever holds one: `config.tower_from`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cli_jax.config import ModelConfig
from cli_jax.hf import names
from cli_jax.hf.checkpoint import Table, compare
from cli_jax.hf.config import differences, vision_config
from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import make_arrays
from cli_jax.hf.source import open_source

PREFIX = "vision_tower."
_DESCRIBED = ("siglip", "clip")  # beginnings of the model types whose config describes a tower


def load_tower(
    where: str | Path, model: ModelConfig, abstract: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """The tower's leaves {path: array}, from a folder, a .safetensors file or a hub id.

    where: a tower alone, a two-tower model or a whole vision-language model, in any known naming.
    abstract: {path: `jax.ShapeDtypeStruct`} of the tower's leaves, with shardings.
    Raises ConversionError that lists what is missing, of another shape or configured otherwise.
    """
    source = open_source(where)
    table = Table()
    table.add(source, only_tower=True)
    layers = model.vision.num_hidden_layers
    table.drop_layers(layers)
    shapes = names.expected(model.vision, model.text, has_newline=False)
    wanted = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
    found = {name: t for name, t in table.tensors.items() if name.startswith(PREFIX)}
    problems: list[str] = []
    if str(source.config.get("model_type", "")).startswith(_DESCRIBED):
        described = vision_config(source.config, layers=layers)
        problems += [f"config {line}" for line in differences(described, model.vision)]
    problems += compare(wanted, found)
    if problems:
        raise ConversionError("\n  ".join([f"{where} does not hold this vision tower:", *problems]))
    return make_arrays(names.leaves(wanted), found, abstract)
