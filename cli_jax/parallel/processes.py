"""Joining the other processes of a run."""

from __future__ import annotations

import os

import jax

from cli_jax.experiment import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the run's other processes; the same call is made on all of them, before anything else.

    On TPU pods, SLURM and Kubernetes jax finds them by itself. Elsewhere three environment
    variables name them, of which jax itself only reads the address. Collectives between CPUs are
    jax's default, gloo.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    if COUNT not in given and INDEX not in given:
        _initialize()
        return
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise ConfigError(f"{' and '.join(given)} need {' and '.join(missing)} to be set, too")
    if not (given[COUNT].isdecimal() and given[INDEX].isdecimal()):
        raise ConfigError(f"{COUNT}={given[COUNT]!r} and {INDEX}={given[INDEX]!r} must be numbers")
    count, index = int(given[COUNT]), int(given[INDEX])
    if index >= count:
        raise ConfigError(f"{INDEX}={index} must be less than {COUNT}={count}: it counts from 0")
    _initialize(coordinator_address=given[ADDRESS], num_processes=count, process_id=index)


def _initialize(**arguments: str | int) -> None:
    try:
        jax.distributed.initialize(**arguments)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(
            f"--distributed finds no TPU pod, SLURM or Kubernetes job to join ({error}) Without "
            f"one, set {ADDRESS} (host:port of process 0), {COUNT} and {INDEX} (0, 1, ...)"
        ) from error
