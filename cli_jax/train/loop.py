"""The training loop.

One iteration: take a batch from the host, dispatch an update, then look at the metrics of the
update before. So the device always has the next update queued while the host waits, and the loss
is still checked after every update.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cli_jax.experiment import ConfigError, Experiment
from cli_jax.parallel.mesh import batch_shards
from cli_jax.train.checkpoint import Checkpoints
from cli_jax.train.goodput import Goodput
from cli_jax.train.initial import init_state, load_initial
from cli_jax.train.interrupt import Interrupt
from cli_jax.train.metrics import MetricsLog
from cli_jax.train.profile import Profile
from cli_jax.train.report import parameter_table
from cli_jax.train.setup import Setup, make_setup
from cli_jax.train.state import TrainState, flatten
from cli_jax.train.step import compile_step
from cli_jax.train.watchdog import Watchdog
from cli_jax.train.workdir import alone, describe, git_revision, prepare

AtSave = Callable[[Setup, TrainState], None]  # is told the state of a checkpoint
Finished = Callable[[int, dict[str, float]], None]  # is told the number and metrics of an update


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step, and from where to go on."""


class Result(NamedTuple):
    """`complete` is False when the run was interrupted and saved."""

    setup: Setup
    state: TrainState
    complete: bool


def train(
    experiment: Experiment,
    workdir: str,
    data: Any,
    *,
    at_save: AtSave | None = None,
    watchers: tuple[Finished, ...] = (),
) -> Result:
    """Trains to `experiment.total_steps`, from the newest checkpoint in `workdir` if there is one.

    `data` iterates over this process's rows of each batch and can be saved (`get_state`,
    `set_state`). `at_save` may measure the state of each checkpoint on the way, and is told of the
    one that a run goes on from, too; `watchers` are told of every finished update. Raises
    `TrainingError` on a loss that is not finite.
    """
    folder, revision = prepare(workdir), git_revision()
    total, settings = experiment.total_steps, experiment.log
    profile = Profile(folder, settings.profile, total)
    goodput = Goodput(folder, settings.every)
    setup = make_setup(experiment)
    check_processes(setup)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(folder))
        interrupt = stack.enter_context(Interrupt())
        checkpoints = Checkpoints(folder, experiment.checkpoint)
        stack.callback(checkpoints.close)
        state = start(setup, checkpoints, data)
        describe(folder, experiment, revision)
        first = step = saved = int(state.step)

        def due(step: int) -> bool:
            return step % experiment.checkpoint.every == 0 or step == total

        if at_save is not None and first and due(first):
            at_save(setup, state)  # what a kill between saving and measuring has left open
        if first >= total:
            return Result(setup, state, complete=True)
        with goodput.spent("compile"):
            update = _compiled(setup)
        log = MetricsLog(folder, first, total, settings.every)
        stack.callback(log.close)
        stack.callback(profile.close)
        goodput.begin(first)
        watchdog = stack.enter_context(Watchdog(settings.stall_seconds, first))
        finished = (log.done, goodput.done, profile.done, watchdog.done, *watchers)
        pending: tuple[int, Any] | None = None
        while step < total and not interrupt.requested(step):
            with goodput.fetching(pending):
                rows = next(data)
            step += 1
            with profile.update(step):
                state, metrics = update(state, to_device(setup, rows))
            if pending:
                _finish(*pending, checkpoints, finished)
            pending = (step, metrics)
            if due(step):
                _finish(*pending, checkpoints, finished)
                pending = None
                with watchdog.paused(), goodput.spent("save"):
                    saved = checkpoints.save(state, data, experiment, revision)
                goodput.record(step)
                if at_save is not None:
                    with watchdog.paused(), goodput.spent("measure"):
                        at_save(setup, state)
        if pending:
            _finish(*pending, checkpoints, finished)
        with watchdog.paused(), goodput.spent("save"):
            if step > saved:
                checkpoints.save(state, data, experiment, revision)
            checkpoints.wait()
    say(goodput.finish(step))
    return Result(setup, state, complete=step == total)


def start(setup: Setup, checkpoints: Checkpoints, data: Any) -> TrainState:
    """The newest checkpoint's state, or a new one from `config.init_from`; says which."""
    state = checkpoints.restore(setup.state, data, setup.experiment)
    if state is not None:
        say(f"resuming after step {int(state.step)} from {checkpoints.directory}")
    else:
        loaded, sentence = load_initial(setup)
        say(sentence)
        state = init_state(setup, loaded)
    say(parameter_table(flatten(setup.state.params), setup.rates))
    shape = " x ".join(f"{axis}={size}" for axis, size in setup.mesh.shape.items())
    say(f"mesh: {shape} on {jax.device_count()} {jax.devices()[0].device_kind}")
    for note in setup.notes:
        say(f"note: {note}")
    return state


def to_device(setup: Setup, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows -> global arrays split over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(leaf.sharding, rows[name], leaf.shape)
        for name, leaf in setup.batch.items()
    }


def rows_per_process(experiment: Experiment) -> int:
    """How many rows of a batch each process reads."""
    rows, processes = experiment.data.batch_size, jax.process_count()
    if rows % processes:
        raise ConfigError(
            f"config.data.batch_size={rows} is not a multiple of the {processes} processes"
        )
    return rows // processes


def check_processes(setup: Setup) -> None:
    """Refuses a mesh in which processes share rows: each reads rows of its own."""
    rows, sharding = setup.experiment.data.batch_size, setup.batch["labels"].sharding
    slices = set(map(str, sharding.addressable_devices_indices_map((rows,)).values()))
    own = len(slices) * rows // batch_shards(setup.mesh)
    if own != rows // jax.process_count():
        raise ConfigError(
            f"config.mesh.tensor={setup.mesh.shape['tensor']} reaches over several processes, "
            f"which would share rows: give it at most the devices of one process"
        )


def say(text: str) -> None:
    """Prints on the first process only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _compiled(setup: Setup) -> Any:
    begun = time.perf_counter()
    update = compile_step(setup)
    say(f"compiled the update in {time.perf_counter() - begun:.1f} s")
    return update


def _finish(
    step: int, metrics: Any, checkpoints: Checkpoints, finished: tuple[Finished, ...]
) -> None:
    """Waits for an update, stops the run if its loss or gradient is not finite, and tells of it."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    bad = [
        f"{name} is {values[name]}"
        for name in ("loss", "grad_norm")
        if not math.isfinite(values[name])
    ]
    if bad:
        checkpoints.wait()
        raise TrainingError(
            f"{' and '.join(bad)} at step {step}: stopped. {checkpoints.describe_latest()}; a "
            f"lower learning rate, clipping or float32 may help"
        )
    for done in finished:
        done(step, values)
