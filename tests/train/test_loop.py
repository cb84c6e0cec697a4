"""The loop's behavior around updates; the compiled update is that of the session's setup."""

import dataclasses
import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny

from cli_jax.experiment import LogConfig, from_dict
from cli_jax.train.checkpoint import FOLDER, CheckpointError, find_step, load_params
from cli_jax.train.initial import load_initial
from cli_jax.train.loop import TrainingError
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten, unflatten


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def poison(at):
    """Makes one parameter NaN before update `at`."""

    def around(step, state):
        if step != at:
            return state
        leaves = flatten(state.params)
        leaves["lm_head/kernel"] = leaves["lm_head/kernel"].at[0, 0].set(jnp.nan)
        return state.replace(params=unflatten(leaves))

    return around


def test_a_finished_run_has_nothing_left_to_do(go, tmp_path):
    (result, calls) = go(tmp_path)
    assert calls == list(range(1, 8))
    assert result.complete
    again, calls = go(tmp_path)
    assert calls == []
    assert again.complete
    chex.assert_trees_all_equal(result.state, again.state)


def test_metrics_are_logged_every_few_updates_and_at_the_end(go, tmp_path):
    go(tmp_path, log=LogConfig(every=3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert {"loss", "grad_norm", "lr", "tokens_per_second", "images_per_second"} <= lines[0].keys()
    assert lines[0]["lr"] > lines[1]["lr"] > lines[2]["lr"]


@pytest.mark.parametrize(("at", "last"), [(2, None), (5, 3), (6, 3), (7, 6)])
def test_a_loss_that_is_not_finite_stops_and_is_never_saved(go, tmp_path, at, last):
    with pytest.raises(TrainingError) as error:
        go(tmp_path, around=poison(at))
    text = str(error.value)
    assert f"loss is nan and grad_norm is nan at step {at}: stopped" in text
    if last is None:
        assert f"no good checkpoint in {tmp_path / FOLDER}" in text
        return
    assert f"the last good checkpoint is {tmp_path / FOLDER / str(last)}" in text
    assert find_step(tmp_path) == last
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path)))


class Signals(train_tiny.Data):
    def __init__(self, experiment, at, number):
        super().__init__(experiment)
        self.at, self.number = at, number

    def __next__(self):
        batch = super().__next__()
        if self.position == self.at:
            os.kill(os.getpid(), self.number)
        return batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_handlers_are_given_back(go, setup, tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    data = Signals(setup.experiment, 4, number)
    result, calls = go(tmp_path, data=data)
    assert calls == [1, 2, 3, 4]
    assert not result.complete
    assert find_step(tmp_path) == 4
    assert logged(tmp_path) == [1, 2, 3, 4]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_right_after_a_save_does_not_save_again(go, setup, tmp_path):
    _, calls = go(tmp_path, data=Signals(setup.experiment, 3, signal.SIGTERM))
    assert calls == [1, 2, 3]
    assert find_step(tmp_path) == 3


def test_a_failure_in_the_data_leaves_the_checkpoints_usable(go, setup, tmp_path):
    class Fails(train_tiny.Data):
        def __next__(self):
            if self.position == 5:
                raise ValueError("row 17 is bad")
            return super().__next__()

    with pytest.raises(ValueError, match="row 17"):
        go(tmp_path, data=Fails(setup.experiment))
    assert find_step(tmp_path) == 3
    _, calls = go(tmp_path)
    assert calls == [4, 5, 6, 7]


def test_parameters_can_come_from_another_workdir(go, setup, tmp_path):
    (result, _) = go(tmp_path)
    experiment = dataclasses.replace(setup.experiment, init_from=str(tmp_path))
    loaded, sentence = load_initial(dataclasses.replace(setup, experiment=experiment))
    assert "new: none" in sentence
    for path, leaf in flatten(result.state.params).items():
        np.testing.assert_array_equal(loaded[path], leaf)


def test_what_another_workdir_lacks_is_new_and_other_shapes_are_refused(go, setup, tmp_path):
    go(tmp_path)
    leaves = flatten(setup.state.params)
    bias = leaves["multi_modal_projector/linear_1/bias"]
    experiment = dataclasses.replace(setup.experiment, init_from=str(tmp_path))

    def wanting(**changes):
        params = unflatten(leaves | changes)
        state = setup.state.replace(params=params)
        return load_initial(dataclasses.replace(setup, experiment=experiment, state=state))

    loaded, sentence = wanting(**{"fusion/extra": bias})
    assert "new: fusion/extra" in sentence
    assert "fusion/extra" not in loaded
    other = jax.ShapeDtypeStruct((5,), bias.dtype, sharding=bias.sharding)
    with pytest.raises(CheckpointError, match=r"image_newline: \(32,\) there, \(5,\) here"):
        wanting(image_newline=other)


def test_parameters_mean_what_they_meant_where_they_come_from(go, setup, tmp_path):
    """No shape tells whether gates saw the prompt, or how many heads a layer has."""
    go(tmp_path)
    model = setup.experiment.model

    def load(**changes):
        changed = dataclasses.replace(model, **changes)
        experiment = dataclasses.replace(
            setup.experiment, init_from=str(tmp_path), model=changed, seed=5
        )
        return load_initial(dataclasses.replace(setup, experiment=experiment))

    assert "new: none" in load()[1]
    drawn = dataclasses.replace(model.text, initializer_range=0.5)
    assert "new: none" in load(text=drawn)[1]
    with pytest.raises(CheckpointError, match=r"fusion\.cli\.context: checkpoint 'image', config"):
        load(fusion=dataclasses.replace(model.fusion, context="prompt"))
    heads = dataclasses.replace(model.vision, num_attention_heads=4)
    with pytest.raises(CheckpointError, match=r"model\.vision\.num_attention_heads: checkpoint 2"):
        load(vision=heads)


def test_a_strategy_takes_from_another_ones_run_what_it_has_a_use_for(go, setup, tmp_path):
    go(tmp_path)
    config = train_tiny.config() | {"init_from": str(tmp_path)}
    config["fusion"] = {"name": "none"}
    loaded, sentence = load_initial(make_setup(from_dict(config)))
    assert "not used: fusion/agf/gate_bias, " in sentence
    assert not any(path.startswith("fusion/") for path in loaded)
    assert "multi_modal_projector/linear_1/kernel" in loaded
    config["fusion"] = {
        "name": "dense_connector",
        "dense_connector": {"variant": "sci", "taps": [0, 1]},
    }
    loaded, sentence = load_initial(make_setup(from_dict(config)))
    assert "its projector does not fit 'dense_connector': left out" in sentence
    assert not any(path.startswith("multi_modal_projector/") for path in loaded)


def test_the_tower_can_come_from_another_place_than_the_rest(go, setup, tmp_path):
    go(tmp_path / "whole")
    (tower, _) = go(tmp_path / "tower", total_steps=3)
    experiment = dataclasses.replace(
        setup.experiment, init_from=str(tmp_path / "whole"), tower_from=str(tmp_path / "tower")
    )
    loaded, sentence = load_initial(dataclasses.replace(setup, experiment=experiment))
    assert f"the vision tower from {tmp_path / 'tower'}" in sentence
    whole = load_params(tmp_path / "whole")
    other = {"vision_tower": tower.state.params["vision_tower"]}
    for path, leaf in flatten(whole | other).items():
        np.testing.assert_array_equal(loaded[path], leaf)
    alone = dataclasses.replace(experiment, init_from="")
    loaded, sentence = load_initial(dataclasses.replace(setup, experiment=alone))
    assert set(loaded) == {path for path in flatten(whole) if path.startswith("vision_tower/")}
    assert "new: " in sentence
