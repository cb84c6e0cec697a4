"""One update: gradients of the trained leaves summed over microbatches, then the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from cli_jax.parallel.rules import Rules
from cli_jax.train.loss import LossSums, loss_sums
from cli_jax.train.optimizer import schedule, trained
from cli_jax.train.setup import Setup, shardings
from cli_jax.train.state import Params, TrainState, merge, split

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Sums = Callable[[Params, Params, Batch], tuple[Params, LossSums]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


# XLA:CPU hands single products to its library by default, with a transposed copy that is fused
# with the derivative of an activation and walks memory against its order. Left in fusions, products
# transpose by themselves: a step of 12M parameters takes three quarters of the time on 2 cores
# (`python -m benchmarks.step`, 2026-11-21).
_CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def compile_step(setup: Setup) -> Any:
    """The compiled update (state, batch) -> (state, metrics); the given state is consumed.

    It takes arrays of exactly the shapes and shardings of `setup`, so nothing is ever recompiled.
    """
    platform = setup.mesh.devices.flat[0].platform
    return lower_step(setup).compile(_CPU_OPTIONS if platform == "cpu" else None)


def lower_step(setup: Setup) -> Any:
    """The update lowered for the setup's devices, which need not be this machine's."""
    step = jax.jit(
        make_step(setup),
        donate_argnums=0,
        in_shardings=(shardings(setup.state), shardings(setup.batch)),
        out_shardings=(
            shardings(setup.state),
            NamedSharding(setup.mesh, PartitionSpec()),
        ),
    )
    with setup.context():
        return step.lower(setup.state, setup.batch)


def make_step(setup: Setup) -> Step:
    """The update as a pure function.

    Metrics, float32 []: `loss` and `accuracy` (greedy next token) over labeled tokens, `grad_norm`
    before clipping, `lr` (the largest group's), `labeled`, `tokens` and `images` of the batch.
    """
    config = setup.experiment.optimizer
    rates = trained(setup.rates)
    factor = schedule(config, setup.experiment.total_steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, frozen = split(state.params, rates)
        grads, sums = gradients(setup, trainable, frozen, batch)
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, trainable)
        params = merge(optax.apply_updates(trainable, updates), frozen)
        metrics = {
            "loss": sums.loss / jnp.maximum(sums.weight, 1),
            "accuracy": sums.correct / jnp.maximum(sums.labeled, 1),
            "grad_norm": optax.tree.norm(grads),
            "lr": factor(state.step) * max(rates.values()),
            "labeled": sums.labeled,
            "tokens": jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            "images": jnp.sum(batch["image_segment"] > 0, dtype=jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def gradients(
    setup: Setup, trainable: Params, frozen: Params, batch: Batch
) -> tuple[Params, LossSums]:
    """Gradient of the batch's loss by the trained leaves, float32, and the batch's sums.

    Only `trainable` is differentiated: no backward pass is built for what is frozen. Microbatches
    are summed in float32 and divided once by the weight of the whole batch, so their number does
    not change the result.
    """
    experiment = setup.experiment
    apply: Any = setup.model.apply

    def sums_of(trainable: Params, frozen: Params, microbatch: Batch) -> tuple[jax.Array, LossSums]:
        params = {"params": merge(trainable, frozen)}
        output = apply(params, microbatch)
        hidden, positions = output.scored or (output.hidden, None)
        sums = loss_sums(
            hidden,
            microbatch["labels"],
            microbatch["segment_ids"],
            lambda hidden: apply(params, hidden, method="logits"),
            average=experiment.optimizer.loss_average,
            chunk=experiment.compute.loss_chunk,
            positions_BxR=positions,
        )
        return sums.loss, sums

    def of_microbatch(
        trainable: Params, frozen: Params, microbatch: Batch
    ) -> tuple[Params, LossSums]:
        grads, sums = jax.grad(sums_of, has_aux=True)(trainable, frozen, microbatch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    parts = experiment.optimizer.accumulate
    if parts == 1:
        grads, sums = of_microbatch(trainable, frozen, batch)
    elif setup.mesh.shape["data"] == 1:
        grads, sums = _accumulate(of_microbatch, trainable, frozen, batch, parts, setup.rules)
    else:
        grads, sums = _reduce_once(setup, of_microbatch)(trainable, frozen, batch)
    weight = jnp.maximum(sums.weight, 1)  # a batch without any label has a zero gradient
    return jax.tree.map(lambda g: g / weight, grads), sums


def _accumulate(
    of_microbatch: Sums, trainable: Params, frozen: Params, batch: Batch, parts: int, rules: Rules
) -> tuple[Params, LossSums]:
    """The sum of `of_microbatch` over `parts` microbatches, one after another."""
    microbatches = _microbatches(batch, parts, rules)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shape = jax.eval_shape(of_microbatch, trainable, frozen, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_microbatch(trainable, frozen, microbatch)), None

    return jax.lax.scan(add, zero, microbatches)[0]


def _reduce_once(setup: Setup, of_microbatch: Sums) -> Sums:
    """`_accumulate` where several copies of the model share the batch (mesh axis `data`).

    Every copy adds up its own microbatches, along an axis of copies that `data` splits, and that
    axis is summed once at the end. Left to itself the compiler would reduce every microbatch over
    what may be the slow network.
    """
    parts, copies = setup.experiment.optimizer.accumulate, setup.mesh.shape["data"]
    own = tuple(axis for axis in setup.rules.batch if axis != "data")
    rules = dataclasses.replace(setup.rules, batch=own)

    def of_copies(trainable: Params, frozen: Params, batch: Batch) -> Any:
        def of_copy(batch: Batch) -> Any:
            return _accumulate(of_microbatch, trainable, frozen, batch, parts, rules)

        def split_rows(x: jax.Array) -> jax.Array:
            x = x.reshape(copies, x.shape[0] // copies, *x.shape[1:])
            return jax.lax.with_sharding_constraint(x, PartitionSpec("data", own))

        with nn.logical_axis_rules(rules.pairs()):
            split_batch = {name: split_rows(x) for name, x in batch.items()}
            each = jax.vmap(of_copy, spmd_axis_name="data")(split_batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), each)

    return of_copies


def _microbatches(batch: Batch, parts: int, rules: Rules) -> Batch:
    """[B, ...] -> [parts, B/parts, ...] without moving rows between devices.

    Rows lie on the devices in order, so microbatch i takes every parts-th row from i on: each
    device then splits its own rows.
    """
    spec = PartitionSpec(None, rules.batch)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, spec)

    return {name: cut(x) for name, x in batch.items()}
