"""The state a run starts from: loaded parameters where there are some, fresh ones elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from cli_jax import routing
from cli_jax.fusion import registry
from cli_jax.fusion.base import Copy
from cli_jax.hf import load as hf
from cli_jax.hf.tower import load_tower
from cli_jax.train.checkpoint import FOLDER, CheckpointError, load_params, stored_arrays
from cli_jax.train.optimizer import init_optimizer, trained
from cli_jax.train.setup import Setup, shardings
from cli_jax.train.state import TrainState, flatten, split, unflatten

Leaves = dict[str, jax.Array]
TOWER = "vision_tower/"


def init_state(setup: Setup, loaded: Leaves) -> TrainState:
    """The state before the first update, built in its shards by one compiled call.

    `loaded`, {path: array in its shards}, is consumed: its buffers become the state's, so the model
    is never held twice. The other parameters are drawn from `experiment.seed`, but for those that
    the fusion strategy or the routing declares as copies.
    """
    paths, copies = trained(setup.rates), _copies(setup)

    def build(loaded: Leaves) -> TrainState:
        leaves = flatten(setup.init_params(setup.experiment.seed)) | loaded
        for path, (source, layer) in copies.items():
            if path not in loaded:
                whole = leaves[source] if layer is None else leaves[source][layer]
                whole = jnp.broadcast_to(whole, leaves[path].shape)
                leaves[path] = whole.astype(leaves[path].dtype)
        params = unflatten(leaves)
        opt_state = init_optimizer(setup.optimizer, split(params, paths)[0])
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

    with setup.context():
        return jax.jit(build, donate_argnums=0, out_shardings=shardings(setup.state))(loaded)


def load_initial(setup: Setup) -> tuple[Leaves, str]:
    """The leaves that `config.init_from` has for the model, and a sentence on what they are.

    The vision tower is that of `config.tower_from`, if there is one.
    """
    experiment, model = setup.experiment, setup.experiment.model
    wanted = flatten(setup.state.params)
    loaded: Leaves = {}
    lines: list[str] = []
    if source := experiment.init_from:
        notes: tuple[str, ...] = ()
        if _is_workdir(source):
            loaded = _from_workdir("init_from", source, wanted)
        else:
            found = hf.load_params(source, model, setup.state.params, progress=True)
            loaded, notes = flatten(found.params), found.notes
        lines += [f"{len(loaded)} arrays from {source}", *notes]
    if source := experiment.tower_from:
        tower = {path: leaf for path, leaf in wanted.items() if path.startswith(TOWER)}
        if _is_workdir(source):
            part = _from_workdir("tower_from", source, tower)
            if missing := [path for path in tower if path not in part]:
                raise CheckpointError(f"config.tower_from={source} lacks {', '.join(missing[:3])}")
        else:
            part = load_tower(source, model, tower)
        loaded |= part
        lines += [f"the vision tower from {source}"]
    if not lines:
        return {}, "all parameters are new (config.init_from is empty)"
    copies = _copies(setup)
    new = [
        f"{path} (copy of {copies[path]})" if path in copies else path
        for path in wanted
        if path not in loaded
    ]
    return loaded, "\n".join((*lines, f"new: {', '.join(new) or 'none'}"))


def _copies(setup: Setup) -> dict[str, Copy]:
    model, paths = setup.experiment.model, flatten(setup.state.params)
    return {
        **registry.of(model).copies(model.fusion, paths),
        **routing.of(model).copies(model, paths),
    }


def _is_workdir(source: str) -> bool:
    return (epath.Path(source) / FOLDER).exists()


def _from_workdir(setting: str, workdir: str, wanted: dict[str, Any]) -> Leaves:
    """Of the `wanted` leaves {path: jax.ShapeDtypeStruct} those that a workdir's checkpoint has."""
    stored = stored_arrays(workdir)
    common = {path: wanted[path] for path in wanted if path in stored}
    wrong = [
        f"{path}: {stored[path]} there, {leaf.shape} here"
        for path, leaf in common.items()
        if stored[path] != leaf.shape
    ]
    if wrong or not common:
        raise CheckpointError(
            f"config.{setting}={workdir} holds another model: "
            + ("\n  ".join(wrong[:10]) or "no parameter of this one")
        )
    return flatten(load_params(workdir, abstract=unflatten(common)))
