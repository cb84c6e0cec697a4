"""Real processes on one machine: the numbers, checkpoints and stops of several are those of one."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
import train_tiny
from train_processes import run_processes

from cli_jax.experiment import ConfigError
from cli_jax.parallel import processes
from cli_jax.train.checkpoint import FOLDER, Checkpoints, load_params
from cli_jax.train.loop import check_processes, to_device
from cli_jax.train.state import flatten

RARELY = {"checkpoint": {"every": 1000}}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Runs several processes to their end; all of them share one compilation cache."""
    cache = tmp_path_factory.mktemp("cache")

    def run(count, workdir, *arguments, devices=1, **changes):
        changes = ("--changes", json.dumps(changes))
        children = run_processes(count, cache, workdir, *changes, *arguments, devices=devices)
        for child in children:
            assert child.returncode == 0, child.stderr
        return children

    return run


@pytest.fixture
def straight(setup, update, state):
    """What one process logs after each of seven updates, and its parameters after each."""
    logged, params, data = [], [], train_tiny.Data(setup.experiment)
    for _ in range(7):
        state, metrics = update(state, to_device(setup, next(data)))
        logged.append({name: float(value) for name, value in metrics.items()})
        params.append({path: np.array(leaf) for path, leaf in flatten(state.params).items()})
    return logged, params


def assert_same_numbers(workdir, straight, last):
    logged, params = straight
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    for line, metrics in zip(lines, logged, strict=False):
        for name, value in metrics.items():
            np.testing.assert_allclose(line[name], value, rtol=2e-4, err_msg=name)
    found = flatten(load_params(workdir, last))
    for path, leaf in params[last - 1].items():
        np.testing.assert_allclose(found[path], leaf, atol=2e-4, err_msg=path)


def assert_only_the_first_speaks(first, *others):
    assert "all parameters are new" in first.stdout or "resuming after step" in first.stdout
    assert "goodput" in first.stdout
    assert "train:" in first.stderr
    for other in others:
        lines = [line for line in other.stdout.splitlines() if not line.startswith("[Gloo]")]
        assert first.stdout.splitlines()[-len(lines) :] == lines  # the child's own, at the end
        assert "train:" not in other.stderr


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / FOLDER).iterdir())


@pytest.fixture(scope="module")
def stopped(launch, tmp_path_factory):
    """(workdir, step) of two processes, of which the second gets a SIGTERM in update 2."""
    workdir = tmp_path_factory.mktemp("stopped")
    stop = ("--terminate_at_batch", "2", "--process", "1", "--slow", "2")
    children = launch(2, workdir, *stop, **RARELY)
    ends = {child.stdout.splitlines()[-1] for child in children}
    (end,) = ends
    word, step = end.split()
    assert word == "interrupted"
    assert_only_the_first_speaks(*children)
    return workdir, int(step)


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of the stopped run's workdir, and its step."""
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run", stopped[1]


def test_two_processes_have_the_numbers_of_one_and_save_once_when_one_is_asked_to_stop(
    stopped, straight
):
    workdir, step = stopped
    assert 2 <= step < 7
    assert saved(workdir) == [step]
    assert json.loads((workdir / "run.json").read_text())["processes"] == 2
    assert len(list(workdir.glob("events.out.tfevents*"))) == 1
    assert_same_numbers(workdir, straight, step)


def test_one_process_goes_on_from_the_checkpoint_of_two(copied, go, setup, straight):
    workdir, step = copied
    checkpoints = Checkpoints(workdir, setup.experiment.checkpoint)
    restored = checkpoints.restore(setup.state, train_tiny.Data(setup.experiment), setup.experiment)
    checkpoints.close()
    chex.assert_trees_all_equal(load_params(workdir), restored.params)
    result, updates = go(workdir)
    assert updates == list(range(step + 1, 8))
    assert result.complete
    assert_same_numbers(workdir, straight, 7)


def test_data_of_which_each_process_has_its_own_is_refused_in_one_line(copied, setup):
    class Own(train_tiny.Data):
        any_process_count = False

    workdir, step = copied
    checkpoints = Checkpoints(workdir, setup.experiment.checkpoint)
    with pytest.raises(ConfigError, match=rf"{FOLDER}/{step} was written by 2 processes and"):
        checkpoints.restore(setup.state, Own(setup.experiment), setup.experiment)
    checkpoints.close()
    assert saved(workdir) == [step]


@pytest.mark.parametrize("item", ["params", pytest.param("data", marks=pytest.mark.slow)])
def test_damage_that_one_process_finds_is_agreed_on(launch, copied, straight, item):
    workdir, step = copied
    damaged = workdir / FOLDER / str(step + 1)
    shutil.copytree(workdir / FOLDER / str(step), damaged)
    own = [*damaged.glob(f"{item}/ocdbt.process_1/d/*"), *damaged.glob(f"{item}/process_1-*")]
    for path in own:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    first, second = launch(2, workdir, **RARELY)
    assert f"{damaged} is damaged (damaged on another process); moved to" in first.stderr
    assert f"process 1 cannot read {damaged}: " in second.stderr
    assert f"resuming after step {step}" in first.stdout
    assert_same_numbers(workdir, straight, 7)


@pytest.mark.slow
def test_four_processes_have_the_numbers_of_one(launch, straight, tmp_path):
    children = launch(4, tmp_path, mesh={"data": 2, "fsdp": 2}, **RARELY)
    assert_only_the_first_speaks(*children)
    assert "mesh: data=2 x fsdp=2 x tensor=1 on 4 cpu" in children[0].stdout
    assert_same_numbers(tmp_path, straight, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "sizes"),
    [(4, 1, {"data": 4, "fsdp": 1}), (2, 2, {"data": 1, "fsdp": 2, "tensor": 2})],
)
def test_the_checkpoint_of_two_goes_on_elsewhere(launch, copied, straight, count, devices, sizes):
    workdir, step = copied
    children = launch(count, workdir, devices=devices, mesh=sizes, **RARELY)
    assert f"resuming after step {step}" in children[0].stdout
    assert saved(workdir) == [step, 7]
    assert_same_numbers(workdir, straight, 7)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ((None, "2", "0"), "JAX_NUM_PROCESSES and JAX_PROCESS_ID need JAX_COORDINATOR_ADDRESS"),
        (("here:1", None, "0"), "JAX_PROCESS_ID need JAX_NUM_PROCESSES to be set"),
        (("here:1", "two", "0"), "JAX_NUM_PROCESSES='two' and JAX_PROCESS_ID='0' must be numbers"),
        (("here:1", "2", "2"), "JAX_PROCESS_ID=2 must be less than JAX_NUM_PROCESSES=2"),
        ((None, None, None), "no TPU pod, SLURM or Kubernetes job to join .* set JAX_COORDINATOR"),
    ],
)
def test_processes_that_cannot_be_joined_are_one_line(monkeypatch, variables, message):
    names = (processes.ADDRESS, processes.COUNT, processes.INDEX)
    for name, value in zip(names, variables, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)

    def initialize(**arguments):
        assert arguments == {}, "it went on in spite of the error"
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=message):
        processes.join()


def test_a_tensor_axis_over_several_processes_is_refused(setup, monkeypatch):
    check_processes(setup)
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # both of which hold all rows
    with pytest.raises(ConfigError, match=r"config.mesh.tensor=1 reaches over several processes"):
        check_processes(setup)
