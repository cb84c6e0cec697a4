"""Opening what training left in a workdir: the model with its parameters, ready to be asked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh

from cli_jax import batch as batch_lib
from cli_jax.data.collate import Sizes
from cli_jax.experiment import Experiment, MeshConfig, load
from cli_jax.model import vlm
from cli_jax.parallel.mesh import make_mesh
from cli_jax.parallel.rules import Rules, rules_for, shard_params
from cli_jax.train.checkpoint import find_step, load_params
from cli_jax.train.state import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model; `params` are split over all devices of this machine."""

    experiment: Experiment
    model: nn.Module
    params: Params
    step: int
    mesh: Mesh
    rules: Rules

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The mesh and the rules, for everything that is traced."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules.pairs()):
            yield


def open_run(workdir: str | Path, step: int | None = None) -> Run:
    """Reads the config and a checkpoint (the newest one, or that of a step) of a workdir.

    The mesh of training plays no part: the parameters are split over the devices there are now.
    Raises ConfigError without a config.json and CheckpointError without a readable checkpoint.
    """
    experiment = load(workdir)
    step = find_step(workdir, step)
    mesh = make_mesh(MeshConfig(), experiment.model)
    rules, _ = rules_for(experiment.model, mesh)
    model = vlm.build(experiment.model, experiment.compute)
    sizes = Sizes.from_config(experiment.data, experiment.model.vision, 1, experiment.extras)
    row = batch_lib.empty(**dataclasses.asdict(sizes))
    boxed = jax.eval_shape(model.init, jax.random.key(0), row)["params"]
    abstract, _ = shard_params(boxed, mesh, rules)
    return Run(experiment, model, load_params(workdir, step, abstract), step, mesh, rules)
