"""Opening a trained model with its parameters, ready to be asked: a run's, or Hugging Face's."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh

from cli_jax import batch as batch_lib
from cli_jax.data.collate import Sizes
from cli_jax.experiment import ConfigError, Experiment, MeshConfig, load_answering
from cli_jax.hf import load as hf
from cli_jax.hf.describe import describe, is_checkpoint
from cli_jax.hf.error import ConversionError
from cli_jax.model import vlm
from cli_jax.parallel.mesh import make_mesh
from cli_jax.parallel.rules import Rules, rules_for, shard_params
from cli_jax.train.checkpoint import find_step, load_params
from cli_jax.train.state import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model; `params` are split over all devices of this machine.

    step: of the checkpoint; 0 for one of Hugging Face.
    """

    experiment: Experiment
    model: nn.Module
    params: Params
    step: int
    mesh: Mesh
    rules: Rules

    def context(self) -> contextlib.AbstractContextManager[None]:
        """The mesh and the rules, for everything that is traced."""
        return self.rules.on(self.mesh)


def open_run(where: str | Path, step: int | None = None) -> Run:
    """Opens a workdir (its newest checkpoint, or that of a step) or a Hugging Face checkpoint.

    The mesh of training plays no part: the parameters are split over the devices there are now.
    A Hugging Face checkpoint is a folder as `convert.py` writes it, or in any naming that it reads
    without help; it is computed in bfloat16, on CPU in float32. Raises ConfigError without a
    config.json, CheckpointError or ConversionError for parameters that cannot be read.
    """
    if is_checkpoint(where):
        if step is not None:
            raise ConfigError(f"{where} is a Hugging Face checkpoint and has no steps: drop --step")
        experiment = describe(where, "float32" if jax.default_backend() == "cpu" else "bfloat16")
    else:
        experiment, step = load_answering(where), find_step(where, step)
    mesh = make_mesh(MeshConfig(), experiment.model)
    rules, _ = rules_for(experiment.model, mesh)
    model = vlm.build(experiment.model, experiment.compute)
    sizes = Sizes.from_config(experiment.data, experiment.model.vision, 1, experiment.extras)
    row = batch_lib.empty(**dataclasses.asdict(sizes))
    boxed = jax.eval_shape(model.init, jax.random.key(0), row)["params"]
    abstract, _ = shard_params(boxed, mesh, rules)
    if step is None:
        params, step = _whole(where, experiment, abstract), 0
    else:
        params = load_params(where, step, abstract)
    return Run(experiment, model, params, step, mesh, rules)


def _whole(folder: str | Path, experiment: Experiment, abstract: Params) -> Params:
    loaded = hf.load_params(folder, experiment.model, abstract, progress=True)
    if loaded.missing:
        raise ConversionError(
            f"{folder} leaves {', '.join(loaded.missing)} to be trained: start a run from it "
            "(config.init_from) and give that run's workdir"
        )
    return loaded.params
