"""When a step does not fit: what would, found by trying one change after another.

The cheapest changes come first: those that keep the update as it is (rematerialization, more
microbatches, a mesh that splits a row's work), then those that do not (shorter rows).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from cli_jax.dryrun.chips import Topology
from cli_jax.dryrun.compile import Compiled, compile_for
from cli_jax.experiment import ConfigError, Experiment
from cli_jax.parallel.mesh import axis_sizes

_BLOCK = 512  # rows are cut to multiples of it: the attention kernel's largest block
Settings = dict[str, Any]  # "section.field" -> value, as on the command line


def propose(
    experiment: Experiment, topology: Topology, say: Callable[[str], None]
) -> tuple[str, Compiled] | None:
    """The first change that fits, as command-line settings, with what it compiled to."""
    for change in _changes(experiment, len(topology.devices)):
        settings = _flags(change)
        try:
            compiled = compile_for(_with(experiment, change), topology)
        except ConfigError as error:
            say(f"  {settings}: not possible ({error})")
            continue
        memory = compiled.memory
        verdict = "fits" if memory.fits else "does not fit"
        say(f"  {settings}: {memory.total / 2**30:.2f} GiB, {verdict}")
        if memory.fits:
            return settings, compiled
    return None


def _flags(settings: Settings) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in settings.items())


def _with(experiment: Experiment, settings: Settings) -> Experiment:
    for name, value in settings.items():
        section, field = name.split(".")
        changed = dataclasses.replace(getattr(experiment, section), **{field: value})
        experiment = dataclasses.replace(experiment, **{section: changed})
    return experiment


def _changes(experiment: Experiment, devices: int) -> Iterator[Settings]:
    """Ever stronger changes: rematerialization and microbatches stay when others are tried."""
    done: Settings = {}
    if experiment.compute.remat not in ("full", "offload"):
        done = {"compute.remat": "full"}
        yield done
    data, fsdp, _ = axis_sizes(experiment.mesh, experiment.model, devices)
    rows = experiment.data.batch_size // (data * fsdp)  # per device and update
    parts = experiment.optimizer.accumulate
    for more in range(parts + 1, rows + 1):
        if rows % more == 0:
            done, parts = done | {"optimizer.accumulate": more}, more
            yield done
    if experiment.compute.remat != "offload":
        yield done | {"compute.remat": "offload"}
    for tensor in _tensor_sizes(experiment, devices):
        yield done | {
            "mesh.data": 1,
            "mesh.fsdp": -1,
            "mesh.tensor": tensor,
            # Fewer rows are worked on at a time: an update needs no more of them than before.
            "optimizer.accumulate": max(parts // tensor, 1),
        }
    for length, visual in _shorter(experiment):
        yield done | {"data.row_length": length, "data.visual_per_row": visual}


def _tensor_sizes(experiment: Experiment, devices: int) -> list[int]:
    heads, now = experiment.model.text.num_attention_heads, experiment.mesh.tensor
    sizes = [n for n in range(now + 1, 9) if heads % n == 0 and devices % n == 0]
    return [n for n in sizes if experiment.data.batch_size % (devices // n) == 0]


def _shorter(experiment: Experiment) -> Iterator[tuple[int, int]]:
    """Rows of three quarters, a half and a quarter of the length, with visual slots to match."""
    data = experiment.data
    text = data.row_length - data.visual_per_row
    for share in (0.75, 0.5, 0.25):
        length = max(int(data.row_length * share) // _BLOCK, 1) * _BLOCK
        if length < data.row_length:
            yield length, max(length - text, length // 2)
