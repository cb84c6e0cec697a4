"""DPVR around the model: what a config may say, how a run starts, learns and is carried on disk."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli_jax.batch import IGNORE, empty
from cli_jax.config import ComputeConfig, ConfigError, RoutingConfig
from cli_jax.evaluate.workdir import open_run
from cli_jax.experiment import from_dict, load, to_dict
from cli_jax.hf.adapter import read_adapter
from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import load_params
from cli_jax.hf.to_hf import to_hf
from cli_jax.model.vlm import build
from cli_jax.train.initial import init_state, load_initial
from cli_jax.train.loss import loss_sums
from cli_jax.train.optimizer import assign_rates, trained
from cli_jax.train.report import parameter_table
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten, unflatten
from cli_jax.train.step import lower_step
from tests.evaluate import eval_small
from tests.routing import dpvr_case as case
from tests.train import train_tiny

SIDE = "routing/side_branch/"
ONLY_SIDE = ({"pattern": "routing/.*", "lr": 1e-2}, {"pattern": ".*", "lr": None})


def raw(**changes):
    base = train_tiny.config()
    base["fusion"] = {"name": "none"}
    base["model"]["text"]["num_hidden_layers"] = 4
    base["routing"] = {"name": "dpvr", "saturation": 2}
    base["data"]["text_per_row"] = 20
    base["optimizer"]["groups"] = ONLY_SIDE
    for name, value in changes.items():
        base[name] = {**base[name], **value}
    return base


# ---- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"text_per_row": 0}}, r"config\.data\.text_per_row=0: .* e\.g\. 14$"),
        ({"data": {"text_per_row": 25}}, r"config\.data\.text_per_row=25: .* give 1 to 24"),
        ({"data": {"template": "plain"}}, r"template=plain .* use another template"),
        ({"routing": {"saturation": 4}}, r"saturation=4: the decoder has 4 layers, give 1 to 3"),
        ({"routing": {"saturation": 0}}, r"saturation=0"),
        ({"routing": {"name": "dvpr"}}, r"config\.routing\.name must be one of \['none', 'dpvr'\]"),
        ({"routing": {"saturatoin": 2}}, r"did you mean 'saturation'"),
        (
            {"fusion": {"name": "cli", "cli": {"taps": "all", "inject": [0, 2, 3]}}},
            r"fusion\.cli injects at decoder layers \[2, 3\], .* inject before layer 2 only",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(changes, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(raw(**changes))


def test_a_config_survives_json_and_old_ones_have_no_routing():
    experiment = from_dict(raw())
    assert experiment.model.routing == RoutingConfig("dpvr", 2)
    assert from_dict(to_dict(experiment)) == experiment
    old = {name: value for name, value in raw().items() if name != "routing"}
    old["optimizer"] = {}
    assert from_dict(old).model.routing.name == "none"


def test_a_model_needs_text_slots():
    m, batch = case.model(), dict(case.packed())
    batch["text_position"], batch["text_index"] = np.zeros((2, 2, 0), np.int32)
    with pytest.raises(ValueError, match=r"text_position is empty: .*config\.data\.text_per_row"):
        jax.eval_shape(m.init, jax.random.key(0), batch)


# ---- the start -----------------------------------------------------------------------------------


def test_the_side_branch_starts_as_layer_s_of_what_was_loaded(tmp_path):
    """From a model without routing, and not over its own loaded parameters."""
    setup = make_setup(from_dict(raw()), jax.devices()[:1])
    drawn = flatten(eval_small.make_model(setup.experiment)[1])
    base = {path: x for path, x in drawn.items() if not path.startswith(SIDE)}
    side = [path for path in drawn if path.startswith(SIDE)]
    assert len(side) == 12

    def starts(setup, loaded):
        given = {path: jnp.array(x) for path, x in loaded.items()}  # consumed
        leaves = jax.tree.map(np.asarray, flatten(init_state(setup, given).params))
        for path in side if not set(side) & set(loaded) else ():
            layers = leaves[path.replace(SIDE, "language_model/layers/")]
            np.testing.assert_array_equal(leaves[path], layers[2])
        return leaves

    leaves = starts(setup, drawn)
    assert all((leaves[path] == drawn[path]).all() for path in side)

    unrouted = from_dict(raw(routing={"name": "none"}, optimizer={"groups": ()}))
    eval_small.save_workdir(tmp_path / "base", unrouted, jax.tree.map(jnp.array, unflatten(base)))
    setup = make_setup(dataclasses.replace(setup.experiment, init_from=str(tmp_path / "base")))
    loaded, sentence = load_initial(setup)
    assert f"{side[0]} (copy of language_model/layers/" in sentence
    assert sentence.count(", layer 2)") == 12
    layers = starts(setup, loaded)["language_model/layers/mlp/up_proj/kernel"]
    np.testing.assert_array_equal(layers, base["language_model/layers/mlp/up_proj/kernel"])


def test_the_published_config_trains_three_percent():
    experiment = from_dict(importlib.import_module("configs.llava15_7b_dpvr").get_config())
    vision = experiment.model.vision
    row = empty(
        rows=1, length=8, visual=4, tiles=1, images=1, tile_size=vision.image_size,
        patches=vision.num_patches, text=4,
    )  # fmt: skip
    model = build(experiment.model, ComputeConfig())
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), row)["params"])
    leaves = flatten(nn.meta.unbox(boxed))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in leaves.items()}
    new = sum(n for path, n in sizes.items() if path.startswith(SIDE))
    assert new == 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096 == 202_383_360
    assert sum(sizes.values()) == 7_063_427_072 + new
    rates = assign_rates(leaves, experiment.optimizer)
    assert set(trained(rates)) == {path for path in leaves if path.startswith(SIDE)}
    table = parameter_table(leaves, rates)
    (line,) = [line for line in table.splitlines() if line.startswith("new: routing/*")]
    assert line.split()[2:] == ["202,383,360", "2.785%", "lr", "0.0001"]
    assert f"{SIDE}mlp/up_proj/kernel [4096, 11008]" in table


# ---- training ------------------------------------------------------------------------------------


def test_updates_change_the_side_branch_and_nothing_else():
    setup = make_setup(from_dict(raw(optimizer={"accumulate": 2})), jax.devices()[:1])
    state = init_state(setup, {})
    before = jax.tree.map(np.asarray, flatten(state.params))
    layers = before["language_model/layers/self_attn/o_proj/kernel"]
    np.testing.assert_array_equal(before[f"{SIDE}self_attn/o_proj/kernel"], layers[2])
    batch = case.with_text(train_tiny.make_batch(setup.experiment, 0), slots=20)
    update, losses = lower_step(setup).compile(train_tiny.QUICK), []
    for _ in range(6):
        state, metrics = update(state, {k: jax.device_put(v) for k, v in batch.items()})
        losses.append(float(metrics["loss"]))
    for path, leaf in flatten(state.params).items():
        assert (np.asarray(leaf) != before[path]).any() == path.startswith(SIDE), path
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("average", ["tokens", "samples"])
@pytest.mark.parametrize("chunk", [0, 3])
def test_loss_over_some_positions(average, chunk):
    """As if what other positions predict had no label; in a loop over positions."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(2, 12, 5)).astype(np.float32)
    labels = np.where(rng.random((2, 12)) < 0.7, rng.integers(0, 5, (2, 12)), IGNORE)
    segment = np.array([[1] * 5 + [2] * 6 + [0], [1] * 12])
    positions = np.array([[0, 1, 4, 6, 7, 8, 12], [2, 3, 5, 8, 11, 12, 12]])
    dense = np.take_along_axis(hidden, np.minimum(positions, 11)[..., None], 1)
    found = loss_sums(
        dense, labels, segment, lambda h: h, average=average, chunk=chunk, positions_BxR=positions
    )
    per_sample = {}
    for b in range(2):
        for at in positions[b][positions[b] < 11]:
            if segment[b, at] == segment[b, at + 1] != 0 and labels[b, at + 1] != IGNORE:
                logits = hidden[b, at].astype(np.float64)
                entropy = np.log(np.exp(logits).sum()) - logits[labels[b, at + 1]]
                per_sample.setdefault((b, segment[b, at]), []).append(entropy)
    each = [np.mean(x) for x in per_sample.values()]
    every = [x for some in per_sample.values() for x in some]
    assert 3 < len(every) < 12
    assert found.labeled == len(every)
    expected = (sum(each), len(each)) if average == "samples" else (sum(every), len(every))
    np.testing.assert_allclose([found.loss, found.weight], expected, rtol=1e-5)


# ---- on disk -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workdir of a routed model, exported whole and as an adapter."""
    folder = tmp_path_factory.mktemp("routed")
    experiment = from_dict(raw())
    _, params = eval_small.make_model(experiment)
    workdir = eval_small.save_workdir(folder / "run", experiment, params)
    to_hf(workdir, folder / "whole", image_token_id=3)
    to_hf(workdir, folder / "adapter", adapter_only=True)
    return experiment, params, folder


def abstract(experiment):
    return make_setup(experiment, jax.devices()[:1]).state.params


def test_the_side_branch_travels_with_the_adapter(exported):
    experiment, params, folder = exported
    assert load(folder / "run").model.routing == experiment.model.routing
    found = load_params(folder / "whole", experiment.model, abstract(experiment))
    assert not found.missing
    want, got = flatten_dict(params, sep="/"), flatten_dict(found.params, sep="/")
    assert set(want) == set(got)
    assert all((np.asarray(got[path]) == want[path]).all() for path in want)
    kept = read_adapter(folder / "adapter")
    assert set(kept.tensors) == {path for path in want if path.startswith(SIDE)}
    assert kept.routing == {"name": "dpvr", "saturation": 2}


def test_an_adapter_brings_its_routing(exported):
    """The folder is opened as the model that it was."""
    experiment, params, folder = exported
    run = open_run(folder / "whole")
    assert run.experiment.model.routing == experiment.model.routing
    jax.tree.map(np.testing.assert_array_equal, run.params, params)


def test_an_adapter_of_another_routing_is_refused(exported):
    experiment, _, folder = exported
    for other in (RoutingConfig(), RoutingConfig("dpvr", 1)):
        model = dataclasses.replace(experiment.model, routing=other)
        with pytest.raises(ConversionError, match=r"another config\.routing"):
            load_params(folder / "whole", model, abstract(experiment))


def test_routing_may_start_from_a_fusion_adapter(tmp_path):
    """A trained CLI model gets a side branch: its adapter has none, so it is new."""
    cli = {"name": "cli", "cli": {"taps": "all", "inject": [0, 1], "rank": 2}}
    plain = from_dict(raw(fusion=cli, routing={"name": "none"}, optimizer={"groups": ()}))
    _, params = eval_small.make_model(plain)
    to_hf(
        eval_small.save_workdir(tmp_path / "run", plain, params), tmp_path / "x", image_token_id=3
    )
    routed = from_dict(raw(fusion=cli))
    found = load_params(tmp_path / "x", routed.model, abstract(routed))
    assert found.missing
    assert all(path.startswith(SIDE) for path in found.missing)
