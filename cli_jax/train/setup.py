"""Everything a training step needs, as shapes: made from a config without weights, data or steps.

The abstract state and batch carry shardings, so the step can be compiled from a `Setup` alone, for
the devices of this machine or for described ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cli_jax import batch as batch_lib
from cli_jax.data.collate import Sizes
from cli_jax.experiment import ConfigError, Experiment
from cli_jax.parallel.mesh import batch_shards, make_mesh
from cli_jax.parallel.rules import Rules, batch_sharding, rules_for, shard_params
from cli_jax.train import objective
from cli_jax.train.optimizer import Rates, assign_rates, init_optimizer, make_optimizer, trained
from cli_jax.train.state import Params, TrainState, flatten, split


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's static parts. `state` and `batch` hold `jax.ShapeDtypeStruct` with shardings."""

    experiment: Experiment
    model: nn.Module
    mesh: Mesh
    rules: Rules
    rates: Rates
    optimizer: optax.GradientTransformation
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    notes: tuple[str, ...]  # what could not be split over the mesh as the rules say

    def context(self) -> contextlib.AbstractContextManager[None]:
        """The mesh and the rules, for everything that is traced."""
        return self.rules.on(self.mesh)

    def init_params(self, seed: int) -> Params:
        """Fresh parameters from a seed, unboxed; to be called inside `jax.jit`."""
        row = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in self.batch.items()}
        boxed = self.model.lazy_init(jax.random.key(seed), row)["params"]
        return _unbox(boxed)


def make_setup(experiment: Experiment, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Builds the model's shapes, the mesh, the shardings and the optimizer of a run.

    `devices`: those of this machine by default, or a described topology's.
    """
    mesh = make_mesh(experiment.mesh, experiment.model, devices)
    rules, head_notes = rules_for(experiment.model, mesh)
    check_rows(experiment, mesh)
    platform = mesh.devices.flat[0].platform
    try:
        model = objective.of(experiment).build(experiment, platform)
    except ValueError as error:  # layers that this tower or decoder does not have
        raise ConfigError(str(error)) from error
    batch = _abstract_batch(experiment, batch_sharding(mesh, rules))
    # One row is enough for the parameters' shapes, and no mesh is set while they are traced.
    row = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
    boxed = jax.eval_shape(model.init, jax.random.key(0), row)["params"]
    params, leaf_notes = shard_params(boxed, mesh, rules)
    rates = assign_rates(flatten(params), experiment.optimizer)
    optimizer = make_optimizer(experiment.optimizer, trained(rates), experiment.total_steps)
    return Setup(
        experiment=experiment,
        model=model,
        mesh=mesh,
        rules=rules,
        rates=rates,
        optimizer=optimizer,
        state=_abstract_state(params, rates, optimizer, mesh),
        batch=batch,
        notes=(*head_notes, *leaf_notes),
    )


def check_rows(experiment: Experiment, mesh: Mesh) -> None:
    """Refuses a batch that cannot be cut into equal microbatches on every device."""
    rows, parts = experiment.data.batch_size, experiment.optimizer.accumulate
    unit = parts * batch_shards(mesh)
    if parts < 1 or rows % unit:
        raise ConfigError(
            f"config.data.batch_size={rows} is not a multiple of config.optimizer.accumulate="
            f"{parts} x data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {unit}"
        )


def _abstract_batch(
    experiment: Experiment, sharding: NamedSharding
) -> dict[str, jax.ShapeDtypeStruct]:
    rows = experiment.data.batch_size
    sizes = Sizes.from_config(experiment.data, experiment.model.vision, 1, experiment.extras)
    one = batch_lib.empty(**dataclasses.asdict(sizes))
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding)
        for name, x in cast(dict[str, np.ndarray], one).items()
    }


def _abstract_state(
    params: Params, rates: Rates, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Moments lie where their parameters do; counters are on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    trainable, _ = split(params, trained(rates))
    opt_state = jax.eval_shape(lambda tree: init_optimizer(optimizer, tree), trainable)

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # the place of a leaf that another rule updates
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, param: place(leaf, param.sharding),
        opt_state,
        trainable,
        transform_non_params=lambda leaf: place(leaf, whole),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, params, opt_state)


def shardings(tree: Any) -> Any:
    """The shardings of abstract arrays, as `jax.jit` wants them."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _unbox(boxed: Any) -> Params:
    # Not `nn.meta.unbox`: it would constrain every leaf by the rules, without the fallbacks.
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf,
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
