from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from compare_tiny import config, write_data

from cli_jax.compare import runs
from cli_jax.compare.command import compare
from cli_jax.data.pipeline import Loader
from cli_jax.evaluate import run as evaluate_run
from cli_jax.generate.engine import Generator
from cli_jax.train import initial, loop
from cli_jax.train.state import unflatten
from cli_jax.train.step import lower_step
from tests.train import train_tiny


class Programs:
    """Compiles what differs only in seeds and places once, for all tests of a module."""

    def __init__(self):
        self.steps, self.generators, self.states = {}, {}, {}

    def init_state(self, setup, loaded):
        e = setup.experiment
        key = e.model, e.optimizer, None if loaded else e.seed
        if key not in self.states:
            given = jax.tree.map(jnp.copy, loaded)  # it will be consumed
            self.states[key] = initial.init_state(setup, given)
        state = jax.tree.map(jnp.copy, self.states[key])
        return state.replace(params=unflatten(loaded)) if loaded else state

    def compile_step(self, setup):
        e = setup.experiment
        key = e.model, e.optimizer, e.total_steps
        if key not in self.steps:
            self.steps[key] = lower_step(setup).compile(train_tiny.QUICK)
        return self.steps[key]

    def generator(self, model, params, **settings):
        key = model.config
        if key not in self.generators:
            self.generators[key] = Generator(model, params, **settings)
        self.generators[key]._params = params
        return self.generators[key]


@pytest.fixture(scope="module")
def quick():
    """Patches: the programs above, and little optimization of whatever else is compiled."""
    programs = Programs()
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", programs.compile_step)
        patch.setattr(loop, "init_state", programs.init_state)
        patch.setattr(evaluate_run, "Generator", programs.generator)
        yield programs
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@dataclasses.dataclass
class Finished:
    """A whole comparison: its folder, and {(arm, seed, steps): token ids of every batch}."""

    folder: object
    batches: dict


@pytest.fixture(scope="module")
def finished(data, quick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "whole"
    batches, current = {}, []

    def opened(experiment):
        current.append(
            batches.setdefault(
                (experiment.name.split()[-1], experiment.seed, experiment.total_steps), []
            )
        )
        return open_data(experiment)

    def read(loader):
        batch = following(loader)
        current[-1].append(batch["input_ids"].tobytes() + batch["pixel_values"].tobytes())
        return batch

    open_data, following = runs.open_data, Loader.__next__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "open_data", opened)
        patch.setattr(Loader, "__next__", read)
        compare(config(data), folder)
    return Finished(folder, batches)
