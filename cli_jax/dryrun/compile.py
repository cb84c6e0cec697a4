"""Compiles a config's training step for described TPU devices and reads what the compiler says."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax

from cli_jax.dryrun.chips import Topology
from cli_jax.experiment import Experiment
from cli_jax.train.setup import Setup, make_setup
from cli_jax.train.step import lower_step

# How versions of the compiler say it: everything that is used, or the temporaries alone.
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_TEMPORARIES = re.compile(
    r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. `temporaries` are the step's own: activations, gradients, buffers."""

    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    output: float  # the new state, written where the old one was
    total: float
    limit: float  # what the compiler may use of the device's HBM

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step for a topology: its set-up, memory, and, if it fits, its program's text."""

    setup: Setup
    memory: Memory
    text: str
    seconds: float


def compile_for(experiment: Experiment, topology: Topology) -> Compiled:
    """Lowers and compiles the true training step; ConfigError if the config is impossible there.

    A step that needs more memory than there is compiles to nothing: its `text` is empty and its
    memory is what the compiler asked for.
    """
    setup = make_setup(experiment, topology.devices)
    begun = time.perf_counter()
    lowered = lower_step(setup)
    known = {
        "parameters": tree_bytes(setup.state.params),
        "optimizer": tree_bytes(setup.state.opt_state),
        "batch": tree_bytes(setup.batch),
        "output": tree_bytes(setup.state),
    }
    arguments = tree_bytes((setup.state, setup.batch))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        total, limit = _refused(error, arguments)
        memory = Memory(**known, temporaries=total - arguments, total=total, limit=limit)
        return Compiled(setup, memory, "", time.perf_counter() - begun)
    # The peak, with the donated state counted once. The parts do not add up to it: the sizes of
    # temporaries include buffers in the core's own memory and some that are never alive together.
    total = float(compiled.memory_analysis().peak_memory_in_bytes)
    memory = Memory(
        **known,
        temporaries=total - arguments,
        total=total,
        limit=topology.chip.hbm_bytes,
    )
    return Compiled(setup, memory, compiled.as_text(), time.perf_counter() - begun)


def _refused(error: Exception, arguments: float) -> tuple[float, float]:
    """(bytes needed, bytes there are) of a step that does not fit; raises any other error again."""

    def sizes(found: re.Match[str]) -> tuple[float, float]:
        needed, limit = (float(found[i]) * _UNIT[found[i + 1]] for i in (1, 3))
        return needed, limit

    if found := _NEEDED.search(str(error)):
        return sizes(found)
    if found := _TEMPORARIES.search(str(error)):
        needed, limit = sizes(found)
        return needed + arguments, limit
    raise error


def tree_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on one device."""
    return float(
        sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
    )
