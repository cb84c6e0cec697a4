"""A trained model whose gates no longer look: is it the gates' choice by picture that helps?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cli_jax.analysis.gates import gate_layers
from cli_jax.evaluate.workdir import Run
from cli_jax.experiment import ConfigError
from cli_jax.fusion.cli import constant_gates
from cli_jax.model import vlm


def with_constant_gates(run: Run, file: str | Path) -> Run:
    """The run with every gate W[t, k] at its mean, as `analyze.py gates` left it in a gates.npz.

    Raises ConfigError for a run without scalar gates and for means of other layers,
    AnalysisError for a strategy without gates.
    """
    model = run.experiment.model
    layers = gate_layers(model)
    if model.fusion.gate != "scalar":
        raise ConfigError(
            f"config.fusion.cli.gate={model.fusion.gate}: {file} holds means over channels, and "
            "only scalar gates can be replaced by them"
        )
    try:
        with np.load(file) as found:
            W = found["gates"]
            there = tuple(tuple(found[n]) for n in ("decoder_layers", "vision_layers"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): give the gates.npz of `analyze.py gates`"
        ) from error
    if there != layers:
        raise ConfigError(
            f"{file} holds gates of decoder layers {', '.join(there[0])} and vision layers "
            f"{', '.join(there[1])}, the run has {', '.join(layers[0])} and {', '.join(layers[1])}"
        )
    fusion, params = constant_gates(model.fusion, run.params["fusion"], W)
    experiment = dataclasses.replace(
        run.experiment,
        name=f"{run.experiment.name}, constant gates",
        model=dataclasses.replace(model, fusion=fusion),
    )
    return dataclasses.replace(
        run,
        experiment=experiment,
        model=vlm.build(experiment.model, experiment.compute),
        params={**run.params, "fusion": params},
    )
