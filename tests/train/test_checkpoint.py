import dataclasses
import json
import os
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint._src.path import gcs_utils
from train_damage import flip_a_bit, truncate

from cli_jax.experiment import CheckpointConfig, ConfigError
from cli_jax.output import OutputError
from cli_jax.train.checkpoint import (
    FOLDER,
    CheckpointError,
    Checkpoints,
    find_step,
    load_params,
    stored_arrays,
)
from cli_jax.train.fingerprint import inspect
from cli_jax.train.state import TrainState, leaf_paths
from cli_jax.train.workdir import WorkdirError, alone, describe, prepare

EXPERIMENT = train_tiny.experiment()


class Counter(grain.DatasetIterator):
    """A data iterator that only counts."""

    def __init__(self, position=0, settings="a"):
        super().__init__()
        self.position, self.settings = position, settings

    def __next__(self):
        self.position += 1
        return self.position

    def get_state(self):
        return {"position": self.position, "settings": self.settings}

    def set_state(self, state):
        if state["settings"] != self.settings:
            raise ConfigError(f"workers was {state['settings']} and is {self.settings}")
        self.position = state["position"]


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    params = {
        "a": {"kernel": array(30, 40), "bias": array(5)},
        "scale": array(3).astype(jnp.bfloat16),
    }
    moments = {"mu": {"a": {"kernel": array(30, 40)}}, "count": jnp.int32(step)}
    return TrainState(jnp.int32(step), params, (moments, ()))


def abstract(state: TrainState) -> TrainState:
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)


def write(workdir, steps, **options) -> None:
    checkpoints = Checkpoints(workdir, CheckpointConfig(**({"keep": 10} | options)))
    for step in steps:
        checkpoints.save(make_state(step), Counter(10 * step), EXPERIMENT, "abc")
    checkpoints.wait()
    checkpoints.close()


def read(workdir, state=None, data=None, experiment=EXPERIMENT):
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=10))
    data = data or Counter()
    try:
        return checkpoints.restore(abstract(state or make_state(0)), data, experiment), data
    finally:
        checkpoints.close()


def assert_equal(a, b):
    for path, leaf in leaf_paths(a).items():
        other = leaf_paths(b)[path]
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=path)


def test_what_is_saved_comes_back(tmp_path):
    write(tmp_path, [3, 5])
    state, data = read(tmp_path)
    assert_equal(make_state(5), state)
    assert data.position == 50
    metadata = json.loads((tmp_path / FOLDER / "5" / "metadata" / "metadata").read_text())
    assert metadata["revision"] == "abc"
    assert metadata["experiment"]["name"] == "tiny"
    assert find_step(tmp_path) == 5


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    assert read(tmp_path)[0] is None


def test_the_state_is_copied_before_save_returns(tmp_path):
    """The loop's next update consumes the saved state while it is being written."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state, data = make_state(1), Counter(7)
    checkpoints.save(state, data, EXPERIMENT, "")
    next(data)
    jax.tree.map(lambda x: x.delete(), state)
    checkpoints.close()
    restored, data = read(tmp_path)
    assert_equal(make_state(1), restored)
    assert data.position == 7


def test_a_step_is_not_saved_twice(tmp_path):
    with pytest.raises(CheckpointError, match="has a checkpoint of step 2 or later"):
        write(tmp_path, [1, 2, 2])


def test_the_newest_are_kept_and_multiples_for_good(tmp_path):
    write(tmp_path, range(1, 8), keep=2, keep_every=3)
    kept = sorted(int(name) for name in os.listdir(tmp_path / FOLDER))
    assert kept == [3, 6, 7]


def test_params_load_as_numpy_or_onto_devices_and_in_part(tmp_path):
    write(tmp_path, [1, 2])
    params = load_params(tmp_path)
    assert_equal(make_state(2).params, params)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_equal(make_state(1).params, load_params(tmp_path, 1))
    part = {"a": {"kernel": abstract(make_state(0)).params["a"]["kernel"]}}
    loaded = load_params(tmp_path, abstract=part)
    assert isinstance(loaded["a"]["kernel"], jax.Array)
    assert_equal({"a": {"kernel": make_state(2).params["a"]["kernel"]}}, loaded)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), part)
    assert load_params(tmp_path, abstract=half)["a"]["kernel"].dtype == jnp.bfloat16
    assert stored_arrays(tmp_path) == {"a/kernel": (30, 40), "a/bias": (5,), "scale": (3,)}


def test_a_step_that_is_not_there_is_an_error_that_lists_the_others(tmp_path):
    write(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=r"no checkpoint 7 in .*holds \[1, 2\]"):
        load_params(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
        load_params(tmp_path / "nowhere")


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a truncated file": truncate,
    "lost parameters": lambda folder: shutil.rmtree(folder / "params"),
    "lost metadata": lambda folder: (folder / "metadata" / "metadata").unlink(),
    "torn metadata": lambda folder: (folder / "metadata" / "metadata").write_text('{"arr'),
    "a torn data position": lambda folder: (folder / "data" / "process_0-of-1.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, capfd, damage):
    write(tmp_path, [1, 2, 3])
    DAMAGES[damage](tmp_path / FOLDER / "3")
    state, data = read(tmp_path)
    assert_equal(make_state(2), state)
    assert data.position == 20
    assert "3 is damaged" in capfd.readouterr().err
    assert (tmp_path / "damaged" / "3").is_dir()
    write(tmp_path, [3])  # the way is free for it to be written again
    assert_equal(make_state(3), read(tmp_path)[0])


def test_damaged_parameters_are_not_loaded(tmp_path):
    write(tmp_path, [1, 2])
    flip_a_bit(tmp_path / FOLDER / "2")
    with pytest.raises(CheckpointError, match=r"2 cannot be read .*other checkpoints: \[1\]"):
        load_params(tmp_path)


def test_nothing_is_moved_when_no_checkpoint_can_be_read(tmp_path):
    write(tmp_path, [1, 2])
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / FOLDER / step / "params")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        read(tmp_path)
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["1", "2"]


def test_a_save_that_was_cut_off_is_never_picked(tmp_path):
    write(tmp_path, [1])
    unfinished = tmp_path / FOLDER / "7.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / FOLDER / "1", unfinished)
    assert find_step(tmp_path) == 1
    assert_equal(make_state(1), read(tmp_path)[0])
    write(tmp_path, [2])
    assert not unfinished.exists()  # it is cleared away
    assert_equal(make_state(2), read(tmp_path)[0])


def test_a_save_that_was_cut_off_on_an_object_store_is_never_picked(tmp_path, monkeypatch):
    """Nothing is renamed there: a save is written in place, and a file marks it as complete."""
    write(tmp_path, [1, 2])
    (tmp_path / FOLDER / "2" / "commit_success.txt").unlink()
    monkeypatch.setattr(gcs_utils, "is_gcs_path", lambda path: True)
    assert find_step(tmp_path) == 1


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    write(tmp_path, [1])
    bad = make_state(2)
    bad.opt_state[0]["mu"]["a"]["kernel"] = jnp.full((30, 40), jnp.inf)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(CheckpointError, match=rf"step 2 is not finite.*{FOLDER}/1"):
        checkpoints.save(bad, Counter(), EXPERIMENT, "")
    checkpoints.close()
    assert os.listdir(tmp_path / FOLDER) == ["1"]


def test_another_model_or_choice_of_trained_parameters_is_an_error_not_damage(tmp_path):
    write(tmp_path, [1, 2])
    other = make_state(0)
    other.params["a"]["kernel"] = jnp.zeros((30, 41))
    other.params["new"] = jnp.zeros(2)
    other.opt_state[0]["mu"]["a"].clear()
    with pytest.raises(ConfigError) as error:
        read(tmp_path, other)
    text = str(error.value)
    assert "params/a/kernel: checkpoint ((30, 40), 'float32'), config ((30, 41), 'float32')" in text
    assert "params/new: not in the checkpoint" in text
    assert "opt_state/0/mu/a/kernel: only in the checkpoint" in text
    assert "--config.init_from" in text
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["1", "2"]


def test_another_model_of_the_same_shapes_is_an_error(tmp_path):
    """Gates that see the prompt have the parameters of those that see the picture."""
    write(tmp_path, [1])
    fusion = dataclasses.replace(EXPERIMENT.model.fusion, context="prompt")
    model = dataclasses.replace(EXPERIMENT.model, fusion=fusion)
    with pytest.raises(ConfigError) as error:
        read(tmp_path, experiment=dataclasses.replace(EXPERIMENT, model=model))
    assert "config.fusion.cli.context: checkpoint 'image', config 'prompt'" in str(error.value)
    assert os.listdir(tmp_path / FOLDER) == ["1"]
    path = tmp_path / FOLDER / "1" / "metadata" / "metadata"
    metadata = json.loads(path.read_text())
    del metadata["experiment"]["fusion"]["cli"]["context"]  # as from code without this setting
    path.write_text(json.dumps(metadata))
    assert int(read(tmp_path)[0].step) == 1


def test_another_order_of_the_data_is_an_error_not_damage(tmp_path):
    write(tmp_path, [1, 2])
    with pytest.raises(ConfigError, match="workers was a and is b"):
        read(tmp_path, data=Counter(settings="b"))
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["1", "2"]


def test_another_number_of_processes_is_refused(tmp_path):
    write(tmp_path, [1])
    path = tmp_path / FOLDER / "1" / "metadata" / "metadata"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ConfigError, match="written by 2 processes and there are 1"):
        read(tmp_path)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"),
    ],
)
def test_a_full_disk_is_one_line_with_the_last_good_checkpoint(tmp_path, monkeypatch, failure):
    write(tmp_path, [4])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(make_state(5), Counter(), EXPERIMENT, "")
    checkpoints.close()
    text = str(error.value)
    assert "the disk is full" in text
    assert str(tmp_path / FOLDER) in text
    assert text.endswith(f"the last good checkpoint is {tmp_path / FOLDER / '4'}")
    assert "\n" not in text


def test_an_unwritable_workdir_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    with pytest.raises(OutputError, match="Not a directory") as error:
        prepare(folder)
    assert str(folder) in str(error.value)
    assert prepare(tmp_path / "new" / "run").is_dir()
    assert os.listdir(tmp_path / "new" / "run") == []
    with pytest.raises(WorkdirError, match=r"gs://bucket/run is not a folder.*Mount the bucket"):
        prepare("gs://bucket/run")


def test_a_workdir_belongs_to_one_command_at_a_time(tmp_path):
    with alone(tmp_path):
        with pytest.raises(WorkdirError, match=f"{tmp_path} is in use by another"), alone(tmp_path):
            pytest.fail("two wrote to it")
        with alone(tmp_path / ".."):
            pass
    with alone(tmp_path):
        pass


def test_a_workdir_says_what_code_made_it_and_keeps_that_when_the_disk_is_full(tmp_path):
    folder = prepare(tmp_path)
    for revision in ("abc", "abc", "def"):
        describe(folder, EXPERIMENT, revision)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["revision"], run["earlier_revisions"]) == ("def", ["abc"])
    (tmp_path / "run.json.partial").mkdir()  # so that it cannot be written
    with pytest.raises(OutputError, match=r"cannot write .*/run\.json: "):
        describe(folder, EXPERIMENT, "xyz")
    assert json.loads((tmp_path / "run.json").read_text()) == run


def test_checksums_see_every_bit_and_place_and_nothing_else():
    x = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    base = inspect({"x": x})
    assert base == inspect({"x": x + 0})
    assert inspect({"x": x.at[1, 1].set(jnp.nextafter(x[1, 1], 9.0))})[1] != base[1]
    assert inspect({"x": x[::-1]})[1] != base[1]
    assert inspect({"x": x.T.reshape(3, 4)})[1] != base[1]
    assert inspect({"x": x.astype(jnp.bfloat16)})[1] != base[1]
    assert inspect({"x": x.at[0, 0].set(jnp.nan)})[0] is False
    assert inspect({"x": x, "n": jnp.int32(3)})[0] is True
