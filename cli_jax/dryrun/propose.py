"""When a step does not fit: what would, found by trying one change after another.

The cheapest changes come first: those that keep the update as it is (rematerialization, more
microbatches, a mesh that splits a row's work), then those that do not (shorter rows).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from cli_jax.dryrun.chips import Topology
from cli_jax.dryrun.compile import Compiled, compile_for
from cli_jax.experiment import ConfigError, Experiment
from cli_jax.parallel.mesh import axis_sizes

_BLOCK = 512  # rows are cut to multiples of it: the attention kernel's largest block
Change = tuple[str, Experiment]  # what to put on the command line, and what that makes


def propose(
    experiment: Experiment, topology: Topology, say: Callable[[str], None]
) -> tuple[str, Compiled] | None:
    """The first change that fits, as command-line settings, with what it compiled to."""
    for settings, changed in _changes(experiment, len(topology.devices)):
        try:
            compiled = compile_for(changed, topology)
        except ConfigError as error:
            say(f"  {settings}: not possible ({error})")
            continue
        memory = compiled.memory
        verdict = "fits" if memory.fits else "does not fit"
        say(f"  {settings}: {memory.total / 2**30:.2f} GiB, {verdict}")
        if memory.fits:
            return settings, compiled
    return None


def _changes(experiment: Experiment, devices: int) -> Iterator[Change]:
    """Ever stronger changes; each but the last kind goes on from the one before it."""
    done: list[str] = []

    def settings(name: str, value: object) -> str:
        done.append(f"--config.{name}={value}")
        return " ".join(done)

    if experiment.compute.remat not in ("full", "offload"):
        compute = dataclasses.replace(experiment.compute, remat="full")
        experiment = dataclasses.replace(experiment, compute=compute)
        yield settings("compute.remat", "full"), experiment
    data, fsdp, _ = axis_sizes(experiment.mesh, experiment.model, devices)
    rows = experiment.data.batch_size // (data * fsdp)  # per device and update
    more = [n for n in range(experiment.optimizer.accumulate + 1, rows + 1) if rows % n == 0]
    for parts in more:
        optimizer = dataclasses.replace(experiment.optimizer, accumulate=parts)
        changed = dataclasses.replace(experiment, optimizer=optimizer)
        yield " ".join([*done, f"--config.optimizer.accumulate={parts}"]), changed
    if more:
        settings("optimizer.accumulate", more[-1])
        experiment = dataclasses.replace(
            experiment, optimizer=dataclasses.replace(experiment.optimizer, accumulate=more[-1])
        )
    if experiment.compute.remat != "offload":
        compute = dataclasses.replace(experiment.compute, remat="offload")
        changed = dataclasses.replace(experiment, compute=compute)
        yield " ".join([*done, "--config.compute.remat=offload"]), changed
    for tensor in _tensor_sizes(experiment, devices):
        # Fewer rows are worked on at a time: an update needs no more devices than before.
        parts = max(experiment.optimizer.accumulate // tensor, 1)
        changed = dataclasses.replace(
            experiment,
            mesh=dataclasses.replace(experiment.mesh, data=1, fsdp=-1, tensor=tensor),
            optimizer=dataclasses.replace(experiment.optimizer, accumulate=parts),
        )
        flags = (
            f"--config.mesh.data=1 --config.mesh.fsdp=-1 --config.mesh.tensor={tensor} "
            f"--config.optimizer.accumulate={parts}"
        )
        yield " ".join([*done, flags]), changed
    yield from _shorter(experiment, done)


def _tensor_sizes(experiment: Experiment, devices: int) -> list[int]:
    heads, now = experiment.model.text.num_attention_heads, experiment.mesh.tensor
    sizes = [n for n in range(now + 1, 9) if heads % n == 0 and devices % n == 0]
    return [n for n in sizes if experiment.data.batch_size % (devices // n) == 0]


def _shorter(experiment: Experiment, done: list[str]) -> Iterator[Change]:
    """Rows of three quarters, a half and a quarter of the length, with visual slots to match."""
    data = experiment.data
    text = data.row_length - data.visual_per_row
    for share in (0.75, 0.5, 0.25):
        length = max(int(data.row_length * share) // _BLOCK, 1) * _BLOCK
        visual = max(length - text, length // 2)
        if length >= data.row_length:
            continue
        changed = dataclasses.replace(data, row_length=length, visual_per_row=visual)
        flags = f"--config.data.row_length={length} --config.data.visual_per_row={visual}"
        yield " ".join([*done, flags]), dataclasses.replace(experiment, data=changed)
