from __future__ import annotations

import copy

import jax
import pytest
import train_tiny

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
