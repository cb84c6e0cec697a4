"""Trains a vision-language model, or goes on training one.

    python train.py --config configs/quickstart.py --workdir runs/quick
    python train.py --config configs/quickstart.py --workdir runs/quick --config.optimizer.lr=1e-3

The config file is a Python file whose `get_config()` returns every setting; any of them can be
changed on the command line as `--config.section.name=value`. A name that does not exist is refused.

The workdir collects all that a run leaves: config.json, run.json (code revision and machine),
checkpoints/, metrics.jsonl, TensorBoard events, and, when the config has an evaluation,
results.json, predictions.jsonl and pictures. Running the same command again goes on from the newest
checkpoint, exactly as if the run had not been stopped; to start afresh, use another workdir.

SIGTERM, a preemption notice or Ctrl-C saves once and stops. Exit code: 0 when the run is done or
was asked to stop and has saved; 1 with one line on stderr when something has to be changed first.

JAX settings come from the environment, e.g. JAX_PLATFORMS=cpu, or
JAX_COMPILATION_CACHE_DIR=~/.cache/jax to compile a configuration only once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cli_jax import experiment as experiment_lib
from cli_jax.flag_parser import parse
from cli_jax.parallel.memory import keep_freed_memory
from cli_jax.train.errors import EXPECTED
from cli_jax.train.run import run

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, e.g. configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder that collects all that the run leaves.", required=True
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Join the other processes of a TPU pod, SLURM job or Kubernetes job set before anything else; "
    "start the same command on every host.",
)
flags.mark_flag_as_required("config")


def _quiet() -> None:
    """Leaves out what Orbax says of every file; what goes wrong in it arrives as an error here."""
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if not flags.FLAGS["verbosity"].present:
        _quiet()
    keep_freed_memory()
    try:
        experiment = experiment_lib.from_dict(_CONFIG.value)
        if _DISTRIBUTED.value:
            jax.distributed.initialize()
        run(experiment, _WORKDIR.value)
    except EXPECTED as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
