"""The state a run starts from: loaded parameters where there are some, fresh ones elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from cli_jax import routing
from cli_jax.experiment import Experiment, load, to_dict
from cli_jax.fusion import registry
from cli_jax.fusion.base import Copy
from cli_jax.hf import load as hf
from cli_jax.hf.tower import load_tower
from cli_jax.train.checkpoint import FOLDER, CheckpointError, load_params, stored_arrays
from cli_jax.train.optimizer import init_optimizer, trained
from cli_jax.train.resume import config_problems
from cli_jax.train.setup import Setup, shardings
from cli_jax.train.state import TrainState, flatten, split, unflatten

Leaves = dict[str, jax.Array]
TOWER, PROJECTOR = "vision_tower/", "multi_modal_projector/"
MEANING = {  # parameters that begin so mean the same under equal sections of the config only
    TOWER: "model.vision",
    "language_model/": "model.text",
    "fusion/": "fusion",
    "routing/": "routing",
}


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
            loaded, notes = _from_workdir(source, experiment, wanted)
        else:
            found = hf.load_params(source, model, setup.state.params, progress=True)
            loaded, notes = flatten(found.params), found.notes
        lines += [f"{len(loaded)} arrays from {source}", *notes]
    if source := experiment.tower_from:
        tower = {path: leaf for path, leaf in wanted.items() if path.startswith(TOWER)}
        if _is_workdir(source):
            part = _tower_from_workdir(source, experiment, tower)
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


def _from_workdir(
    workdir: str, experiment: Experiment, wanted: dict[str, Any]
) -> tuple[Leaves, tuple[str, ...]]:
    """Of the `wanted` {path: jax.ShapeDtypeStruct} the leaves that a checkpoint has, and notes."""
    stored, model = stored_arrays(workdir), experiment.model
    notes: tuple[str, ...] = ()
    projector = {path: leaf.shape for path, leaf in wanted.items() if path.startswith(PROJECTOR)}
    fits = all(stored.get(path) == shape for path, shape in projector.items())
    if not fits and not registry.of(model).has_plain_projector(model.fusion):
        stored = {path: shape for path, shape in stored.items() if not path.startswith(PROJECTOR)}
        notes += (f"its projector does not fit {model.fusion_name!r}: left out",)
    if unused := [path for path in stored if path not in wanted]:
        notes += (f"not used: {', '.join(unused)}",)
    common = {path: leaf for path, leaf in wanted.items() if path in stored}
    return _read("init_from", workdir, experiment, stored, common), notes


def _tower_from_workdir(workdir: str, experiment: Experiment, tower: dict[str, Any]) -> Leaves:
    stored = stored_arrays(workdir)
    if missing := [path for path in tower if path not in stored]:
        raise CheckpointError(f"config.tower_from={workdir} lacks {', '.join(missing[:3])}")
    return _read("tower_from", workdir, experiment, stored, tower)


def _read(
    setting: str,
    workdir: str,
    experiment: Experiment,
    stored: dict[str, tuple[int, ...]],
    wanted: dict[str, Any],
) -> Leaves:
    """Reads `wanted` from a workdir; CheckpointError lists what is of another shape or meaning."""
    wrong = [
        f"{path}: {stored[path]} there, {leaf.shape} here"
        for path, leaf in wanted.items()
        if stored[path] != leaf.shape
    ]
    sections = [s for prefix, s in MEANING.items() if any(p.startswith(prefix) for p in wanted)]
    wrong += config_problems(to_dict(load(workdir)), to_dict(experiment), sections)
    if wrong or not wanted:
        raise CheckpointError(
            f"config.{setting}={workdir} holds another model: "
            + ("\n  ".join(wrong[:10]) or "no parameter of this one")
        )
    return flatten(load_params(workdir, abstract=unflatten(wanted)))
