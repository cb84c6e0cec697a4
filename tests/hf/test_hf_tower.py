"""`config.tower_from`: the vision tower alone, from whatever holds one."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_models import (
    CLIP,
    LLAMA,
    QWEN,
    SIGLIP,
    abstract_params,
    described,
    model_config,
    same,
    source,
    tower_config,
    weights,
    write,
)
from safetensors.numpy import save_file

from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import load_params
from cli_jax.hf.tower import load_tower

MODEL = model_config(SIGLIP, QWEN)


def tower_of(config):
    leaves = flatten_dict(abstract_params(config), sep="/")
    return {path: leaf for path, leaf in leaves.items() if path.startswith("vision_tower/")}


def alone(vision, text):
    """The tensors of a tower as its own repository names them."""
    tensors = weights(vision, text, newline=False)
    return {
        "vision_model." + name.removeprefix("vision_tower."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_tower.")
    }


@pytest.mark.parametrize("kind", ["whole model", "tower's folder", "file"])
def test_the_tower_is_that_of_the_source(tmp_path, kind):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    wanted = flatten_dict(load_params(folder, MODEL, abstract_params(MODEL)).params, sep="/")
    if kind == "whole model":
        where = folder
    elif kind == "tower's folder":
        where = write(tmp_path / "tower", alone(SIGLIP, QWEN), tower_config(described(SIGLIP)))
    else:
        where = tmp_path / "tower.safetensors"
        save_file(alone(SIGLIP, QWEN), where)
    found = load_tower(where, MODEL, tower_of(MODEL))
    assert set(found) == set(tower_of(MODEL))
    for path, leaf in found.items():
        assert same(np.asarray(leaf), np.asarray(wanted[path])), path


def test_what_does_not_fit_is_listed(tmp_path):
    tensors = alone(SIGLIP, QWEN)
    del tensors["vision_model.post_layernorm.bias"]
    where = write(tmp_path / "tower", tensors, tower_config(described(SIGLIP)))
    wider = dataclasses.replace(SIGLIP, intermediate_size=2 * SIGLIP.intermediate_size)
    model = dataclasses.replace(MODEL, vision=wider)
    with pytest.raises(ConversionError) as caught:
        load_tower(where, model, tower_of(model))
    text = str(caught.value)
    assert "config intermediate_size: checkpoint" in text
    assert "missing vision_tower.post_layernorm.bias" in text
    assert "wrong   vision_tower.encoder.layers.0.mlp.fc1.weight" in text


def test_another_family_is_refused(tmp_path):
    where = write(tmp_path / "tower", alone(CLIP, LLAMA), tower_config(CLIP))
    with pytest.raises(ConversionError, match="config model_type: checkpoint 'clip', model"):
        load_tower(where, MODEL, tower_of(MODEL))
