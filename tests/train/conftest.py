from __future__ import annotations

import copy
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import train_tiny

from cli_jax.train import loop
from cli_jax.train.initial import init_state
from cli_jax.train.setup import make_setup
from cli_jax.train.step import lower_step

# Compiling is most of the work of these tests, so the plain tiny run is set up once.


@pytest.fixture(scope="session")
def setup():
    return make_setup(train_tiny.experiment())


@pytest.fixture(scope="session")
def update(setup):
    return lower_step(setup).compile(train_tiny.QUICK)


@pytest.fixture(scope="session")
def initial(setup):
    return init_state(setup, {})


@pytest.fixture
def state(initial):
    """A fresh copy of the initial state, since updates consume theirs."""
    return jax.tree.map(copy.copy, initial)


@pytest.fixture
def go(setup, update, initial, monkeypatch):
    """Runs the loop with the session's executables; `around(step, state)` may change a state."""

    def run(workdir, *, around=lambda step, state: state, data=None, **changes):
        experiment = dataclasses.replace(setup.experiment, **changes)
        mine = dataclasses.replace(setup, experiment=experiment)
        calls = []

        def step(state, batch):
            calls.append(int(state.step) + 1)
            return update(around(calls[-1], state), batch)

        copied = jax.tree.map(jnp.copy, initial)
        monkeypatch.setattr(loop, "make_setup", lambda _: mine)
        monkeypatch.setattr(loop, "compile_step", lambda _: step)
        monkeypatch.setattr(loop, "init_state", lambda *_: copied)
        return loop.train(experiment, str(workdir), data or train_tiny.Data(experiment)), calls

    return run
