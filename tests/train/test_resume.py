"""A run that is stopped in any way and started again ends in the same bits as one that was not."""

import functools
import json
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import train_tiny
from train_damage import arrays
from train_processes import run_child

from cli_jax.train.checkpoint import FOLDER, Checkpoints, find_step, load_params
from cli_jax.train.loop import to_device
from cli_jax.train.state import flatten


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """Runs the child process; all of them share one compilation cache."""
    return functools.partial(run_child, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(child, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    done = child(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "complete 7"
    return workdir


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / FOLDER).iterdir() if p.name.isdigit())


def lines(workdir):
    """The logged metrics without the speeds."""
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k} for line in logged]


def test_the_workdir_says_what_was_run(uninterrupted):
    assert steps(uninterrupted) == [6, 7]
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["optimizer"]["lr"] == 0.01
    assert config["total_steps"] == 7
    assert json.loads((uninterrupted / "run.json").read_text())["revision"]
    assert list(uninterrupted.glob("events.out.tfevents*"))
    assert np.isfinite([line["loss"] for line in lines(uninterrupted)]).all()


def test_a_run_stopped_in_every_way_ends_in_the_same_bits(child, uninterrupted, tmp_path):
    """SIGTERM, then kill -9 between two checkpoints, then kill -9 in the middle of a save."""
    done = child(tmp_path, "--terminate_at_batch", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "interrupted 2"
    assert steps(tmp_path) == [2]

    done = child(tmp_path, "--kill_at_batch", "6")
    assert "resuming after step 2" in done.stdout
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [2, 3]
    assert lines(tmp_path)[-1]["step"] > 3  # these updates are done again

    done = child(tmp_path, "--kill_in_save", "6")
    assert "resuming after step 3" in done.stdout
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [2, 3]
    assert [path.name for path in (tmp_path / FOLDER).iterdir() if path.name.startswith("6.")]

    done = child(tmp_path)
    assert "resuming after step 3" in done.stdout
    assert done.returncode == 0, done.stderr

    assert find_step(tmp_path) == find_step(uninterrupted) == 7
    saved = arrays(tmp_path / FOLDER / "7")
    assert saved == arrays(uninterrupted / FOLDER / "7")
    assert sum("opt_state" in path for path in saved) > 50
    pair = (load_params(tmp_path), load_params(uninterrupted))
    for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
        assert x.tobytes() == y.tobytes()
    data = Path(FOLDER, "7", "data", "process_0-of-1.json")
    assert (tmp_path / data).read_text() == (uninterrupted / data).read_text()
    assert lines(tmp_path) == lines(uninterrupted)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))


def test_eight_devices_give_the_numbers_of_one(child, setup, update, state, tmp_path):
    """Split over every axis, in two microbatches; and their checkpoint goes on on one device."""
    changes = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "optimizer": {"accumulate": 2}}
    done = child(tmp_path, "--terminate_at_batch", "3", "--changes", json.dumps(changes), devices=8)
    assert done.returncode == 0, done.stderr
    assert "mesh: data=2 x fsdp=2 x tensor=2 on 8 cpu" in done.stdout
    assert "lm_head/kernel: vocab 61 is not divisible by tensor=2: replicated" in done.stdout
    gate_proj = "language_model/layers/mlp/gate_proj/kernel (None, 'fsdp', 'tensor') 8"
    assert gate_proj in done.stdout

    data = train_tiny.Data(setup.experiment)
    for line in lines(tmp_path):
        state, metrics = update(state, to_device(setup, next(data)))
        for name, value in metrics.items():
            np.testing.assert_allclose(line[name], value, rtol=2e-4, err_msg=name)
    assert data.position == 3
    params = load_params(tmp_path)
    for path, leaf in flatten(state.params).items():
        np.testing.assert_allclose(flatten(params)[path], leaf, atol=2e-4, err_msg=path)
    checkpoints = Checkpoints(tmp_path, setup.experiment.checkpoint)
    restored = checkpoints.restore(setup.state, train_tiny.Data(setup.experiment), setup.experiment)
    checkpoints.close()
    assert int(restored.step) == 3
    chex.assert_trees_all_equal(params, restored.params)
