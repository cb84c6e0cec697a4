"""The errors that a user can act on: each is one message that names the thing and the remedy."""

from __future__ import annotations

from cli_jax.analysis.places import PlaceError
from cli_jax.analysis.probe import ProbeError
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.data import DataError
from cli_jax.experiment import ConfigError
from cli_jax.hf.error import ConversionError
from cli_jax.output import OutputError
from cli_jax.train.checkpoint import CheckpointError
from cli_jax.train.loop import TrainingError
from cli_jax.train.workdir import WorkdirError

EXPECTED = (
    AnalysisError,
    CheckpointError,
    ConfigError,
    ConversionError,
    DataError,
    OutputError,
    PlaceError,
    ProbeError,
    TrainingError,
    WorkdirError,
)
