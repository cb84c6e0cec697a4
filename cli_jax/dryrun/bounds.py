"""Lower bounds on the time of a step: arithmetic, memory and network, each at its best."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cli_jax.dryrun import flops, hlo
from cli_jax.dryrun.chips import DCN_BANDWIDTH, Topology
from cli_jax.dryrun.compile import Compiled, tree_bytes
from cli_jax.experiment import Experiment
from cli_jax.fusion import registry
from cli_jax.parallel.mesh import batch_shards


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds per step, and what they follow from (per device, bytes and FLOPs per step)."""

    compute: float  # model FLOPs and what rematerialization repeats, at the chip's peak
    memory: float  # parameters, optimizer, saved activations and the bank through the HBM
    network: float  # all collectives one after another
    recomputed: float  # FLOPs of all devices that rematerialization repeats
    bank: float  # bytes of the bank [K, P, D] that injections read

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.network)


def bounds(
    experiment: Experiment, topology: Topology, compiled: Compiled, model_flops: flops.Flops
) -> Bounds:
    """The bounds of a compiled step. The network's is 0 if the step did not fit."""
    devices, chip = len(topology.devices), topology.chip
    repeated = _repeated(experiment, compiled)
    bank = bank_reads(experiment) / batch_shards(compiled.setup.mesh)
    state = compiled.setup.state
    # Forward, repetition and backward each read the weights in the compute dtype, whole but for
    # what `tensor` splits; the optimizer reads and writes everything once, as it is split.
    width = jnp.dtype(experiment.compute.dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(state.params)) * width
    weights /= compiled.setup.mesh.shape["tensor"]
    passes = 3 * experiment.optimizer.accumulate
    own = tree_bytes(state)
    moved = passes * weights + 2 * own + compiled.memory.temporaries + bank
    collective = sum(hlo.collective_bytes(compiled.text).values()) if compiled.text else 0.0
    link = chip.ici_bandwidth if topology.slices == 1 else DCN_BANDWIDTH
    return Bounds(
        compute=(sum(model_flops.values()) + repeated) / (devices * chip.flops),
        memory=moved / chip.hbm_bandwidth,
        network=collective / link,
        recomputed=repeated,
        bank=bank,
    )


def bank_reads(experiment: Experiment) -> float:
    """Bytes of the bank that all injections of an update read: forward, repetition, backward."""
    model = experiment.model
    row = flops.row_of(experiment)
    once = registry.of(model).bank_reads(model.fusion, model, row)
    width = jnp.dtype(experiment.compute.dtype).itemsize
    times = 3 if experiment.compute.remat != "none" else 2
    return experiment.data.batch_size * times * width * once


def _repeated(experiment: Experiment, compiled: Compiled) -> float:
    forward = flops.forward(experiment.model, flops.row_of(experiment))
    rates = compiled.setup.rates
    differentiated = flops.step(experiment.model, flops.row_of(experiment), 1, rates)
    total = 0.0
    for part, once in forward.items():
        if differentiated[part] <= once:
            continue  # nothing flows back through it
        chunked = part == "head" and experiment.compute.loss_chunk
        layers = part != "head" and experiment.compute.remat in ("full", "offload")
        total += once if chunked or layers else 0.0
    return total * experiment.data.batch_size
