"""Every fusion strategy through workdir, `to-hf`, `from-hf` and back, and what starts as a copy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_models import QWEN, SIGLIP, abstract_params, model_config, same, source
from hf_workdir import random_params, write_workdir

from cli_jax.fusion import registry
from cli_jax.fusion.deepstack import DeepStackConfig
from cli_jax.fusion.dense_connector import DenseConnectorConfig
from cli_jax.fusion.sli import SLIConfig
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.load import load_params
from cli_jax.hf.to_hf import to_hf
from cli_jax.train.initial import init_state, load_initial
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten
from tests.train import train_tiny

# Configs for a tower of two layers where the default needs a deeper one.
CONFIGS = {"sli": SLIConfig(taps=(1, 2)), "deepstack": DeepStackConfig(stacks=1)}
NEW = [name for name in sorted(registry.STRATEGIES) if name != "none"]


def model_of(name):
    model = model_config(SIGLIP, QWEN, name)
    return dataclasses.replace(model, fusion=CONFIGS.get(name, model.fusion))


def assert_same(found, wanted):
    found, wanted = flatten_dict(found, sep="/"), flatten_dict(wanted, sep="/")
    assert set(found) == set(wanted)
    assert all(same(np.asarray(found[path]), np.asarray(wanted[path])) for path in wanted)


@pytest.mark.parametrize("name", NEW)
def test_round_trip(tmp_path, name):
    """to-hf writes all that the model has; it loads again, also normalized once more."""
    model = model_of(name)
    params = random_params(model)
    plain = registry.get(name).has_plain_projector(model.fusion)
    parts = ("fusion/",) if plain else ("fusion/", "multi_modal_projector/")
    own = [path for path in flatten_dict(params, sep="/") if path.startswith(parts)]
    workdir = write_workdir(tmp_path / "run", model, params)
    report = to_hf(workdir, tmp_path / "out", image_token_id=90)
    from_hf(tmp_path / "out", tmp_path / "again")
    for folder in ("out", "again"):
        loaded = load_params(tmp_path / folder, model, abstract_params(model))
        assert loaded.missing == ()
        assert_same(loaded.params, params)
        if own:
            written = json.loads((tmp_path / folder / "cli_adapter.json").read_text())
            assert sorted(written["tensors"]) == sorted(own)
    without = any("transformers would draw one" in note for note in report["notes"])
    assert without != plain


def test_a_projector_of_several_layers_is_new(tmp_path):
    """A checkpoint's own does not fit: it is left out, said so, and the model's is drawn."""
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    model = model_of("dense_connector")
    loaded = load_params(folder, model, abstract_params(model))
    assert set(loaded.missing) == {f"multi_modal_projector/{name}" for name in PROJECTOR}
    assert any("'dense_connector' has no use for 4 tensors" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["deepstack", "dense_connector"])
def test_a_strategy_without_parameters_takes_all_of_a_checkpoint(tmp_path, name):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    model = model_of(name)
    if name == "dense_connector":
        model = dataclasses.replace(model, fusion=DenseConnectorConfig(variant="sti", taps=(1,)))
    loaded = load_params(folder, model, abstract_params(model))
    plain = load_params(folder, model_of("none"), abstract_params(model_of("none")))
    assert loaded.missing == ()
    assert_same(loaded.params, plain.params)


def test_a_strategy_without_a_projector_takes_the_rest_of_a_checkpoint(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    model = model_of("layer_concat")
    loaded = load_params(folder, model, abstract_params(model))
    assert "multi_modal_projector" not in loaded.params
    assert set(loaded.missing) == {"fusion/linear/kernel", "fusion/linear/bias"}
    assert any("'layer_concat' has no use for 4 tensors" in note for note in loaded.notes)


@pytest.mark.parametrize("name", ["layer_concat", "dense_connector"])
def test_an_adapter_without_a_projector_joins_a_base_with_or_without_one(tmp_path, name):
    """Its fingerprint covers what it was trained on; anything else there is still refused."""
    model = model_of(name)
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    base = load_params(folder, model_of("none"), abstract_params(model_of("none"))).params
    params = random_params(model) | {p: base[p] for p in base if p != "multi_modal_projector"}
    workdir = write_workdir(tmp_path / "run", model, params)
    to_hf(workdir, tmp_path / "adapter", adapter_only=True)
    from_hf(folder, tmp_path / "joined", adapter=tmp_path / "adapter")
    loaded = load_params(tmp_path / "joined", model, abstract_params(model))
    assert_same(loaded.params, params)
    params["image_newline"] = params["image_newline"] + 1
    other = write_workdir(tmp_path / "other", model, params)
    to_hf(other, tmp_path / "wrong", adapter_only=True)
    with pytest.raises(ConversionError, match="belongs to the base model"):
        from_hf(folder, tmp_path / "refused", adapter=tmp_path / "wrong")


# ---- what starts as a copy -----------------------------------------------------------------------

PROJECTOR = ("linear_1/kernel", "linear_1/bias", "linear_2/kernel", "linear_2/bias")


def tiny_setup(name, **fusion):
    base = train_tiny.config()
    vision = base["model"]["vision"] | {"num_hidden_layers": 3}
    model = base["model"] | {"vision": vision}
    model["text"] = model["text"] | {"num_hidden_layers": 2}
    fusion = {"name": name, **({name: fusion} if fusion else {})}
    init_from = fusion.get(name, {}).pop("init_from", "")
    return make_setup(train_tiny.experiment(model=model, fusion=fusion, init_from=init_from))


def leaves_at_the_start(name, **fusion):
    setup = tiny_setup(name, **fusion)
    loaded, sentence = load_initial(setup)
    state = init_state(setup, {path: jnp.copy(leaf) for path, leaf in loaded.items()})
    return {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}, sentence


def assert_copies(leaves, taps):
    for name in PROJECTOR:
        own, copied = leaves[f"fusion/projectors/{name}"], leaves[f"multi_modal_projector/{name}"]
        assert own.shape == (taps, *copied.shape)
        np.testing.assert_array_equal(own, np.broadcast_to(copied, own.shape))


def test_sli_starts_as_copies_of_a_random_projector():
    leaves, _ = leaves_at_the_start("sli", taps=(1, 3))
    assert leaves["multi_modal_projector/linear_1/kernel"].std() > 0
    assert_copies(leaves, 2)


def test_sli_starts_as_copies_of_a_loaded_projector(tmp_path):
    """From a stage-1 workdir without strategy; its own parameters stay where there are some."""
    stage1 = tiny_setup("none").experiment
    params = jax.tree.map(lambda x: x, random_params(stage1.model))
    workdir = write_workdir(tmp_path / "stage1", stage1.model, params)
    leaves, sentence = leaves_at_the_start("sli", taps=(1, 3), init_from=str(workdir))
    np.testing.assert_array_equal(
        leaves["multi_modal_projector/linear_2/bias"],
        params["multi_modal_projector"]["linear_2"]["bias"],
    )
    assert_copies(leaves, 2)
    copy = "fusion/projectors/linear_1/bias (copy of multi_modal_projector/linear_1/bias)"
    assert copy in sentence

    model = tiny_setup("sli", taps=(1, 3)).experiment.model
    trained = random_params(model, seed=1)
    workdir = write_workdir(tmp_path / "sli", model, trained)
    leaves, sentence = leaves_at_the_start("sli", taps=(1, 3), init_from=str(workdir))
    for path, leaf in flatten_dict(trained, sep="/").items():
        np.testing.assert_array_equal(leaves[path], leaf)
    assert sentence.endswith("new: none")


def test_sli_starts_as_copies_of_a_hugging_face_projector(tmp_path):
    folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
    base = train_tiny.config()
    model = dataclasses.replace(model_of("sli"))
    experiment = dataclasses.replace(
        train_tiny.experiment(**{k: base[k] for k in ("data",)}), model=model, init_from=str(folder)
    )
    setup = make_setup(experiment)
    loaded, _ = load_initial(setup)
    state = init_state(setup, loaded)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(state.params).items()}
    kernel = tensors["multi_modal_projector.linear_1.weight"].T
    np.testing.assert_array_equal(leaves["multi_modal_projector/linear_1/kernel"], kernel)
    assert_copies(leaves, 2)
