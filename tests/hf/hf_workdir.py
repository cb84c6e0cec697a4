"""Workdirs as training leaves them, with given parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from hf_models import abstract_params

from cli_jax.config import ModelConfig
from cli_jax.experiment import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    to_dict,
)
from cli_jax.train.checkpoint import Checkpoints
from cli_jax.train.state import TrainState


def experiment(model: ModelConfig, **fields: Any) -> Experiment:
    return Experiment(
        **{
            "name": "tiny",
            "model": model,
            "data": DataConfig(),
            "optimizer": OptimizerConfig(),
            "mesh": MeshConfig(),
            "compute": ComputeConfig(),
            "checkpoint": CheckpointConfig(),
            "log": LogConfig(),
            "eval": EvalConfig(),
            **fields,
        }
    )


def random_params(model: ModelConfig, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """Every parameter of the model, redrawn."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32), dtype),
        abstract_params(model),
    )


def write_workdir(
    folder: Path, model: ModelConfig, params: dict[str, Any], step: int = 3, **fields: Any
) -> Path:
    """A workdir with one checkpoint, written by the training code."""
    run = experiment(model, **fields)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(run)))
    checkpoints = Checkpoints(folder, run.checkpoint)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    checkpoints.save(TrainState(jnp.int32(step), params, {}), data, run, "test")
    checkpoints.wait()
    checkpoints.close()
    return folder
