"""Trains a vision-language model, or goes on training one.

    python train.py --config configs/quickstart.py --workdir runs/quick
    python train.py --config configs/quickstart.py --workdir runs/quick --config.optimizer.lr=1e-3

The config file is a Python file whose `get_config()` returns every setting; any of them can be
changed on the command line as `--config.section.name=value`. A name that does not exist is refused.

The workdir collects all that a run leaves: config.json, run.json (code revision and machine),
checkpoints/, metrics.jsonl, goodput.jsonl, TensorBoard events, and, when the config has an
evaluation, results.json, predictions.jsonl and pictures. Running the same command again goes on
from the newest checkpoint, exactly as if the run had not been stopped; to start afresh, use another
workdir.

Before paying for chips, ask what the step needs there (no weights, data or accelerator needed):

    python train.py --config configs/ov7b_cli.py --dry_run --topology v5e:16x16

SIGTERM, a preemption notice or (one process) Ctrl-C saves once and stops. Exit code: 0 when the run
is done or was asked to stop and has saved; 1 with one line on stderr when something has to be
changed first, or with the stacks of all threads when no update has finished for
--config.log.stall_seconds.

--config.log.profile=10:13 traces the updates 10, 11 and 12 into the workdir's profile/, for
TensorBoard. goodput.json says where the time of the run went, restarts included.

JAX settings come from the environment, e.g. JAX_PLATFORMS=cpu, or
JAX_COMPILATION_CACHE_DIR=~/.cache/jax to compile a configuration only once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from cli_jax import experiment as experiment_lib
from cli_jax.flag_parser import parse
from cli_jax.parallel import processes
from cli_jax.parallel.memory import keep_freed_memory
from cli_jax.train.errors import EXPECTED
from cli_jax.train.run import run

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, e.g. configs/quickstart.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that collects all that the run leaves.")
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Join the other processes of a TPU pod, SLURM job or Kubernetes job set, or those that "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name, before anything else; "
    "start the same command on every host.",
)
_DRY_RUN = flags.DEFINE_boolean(
    "dry_run",
    False,
    "Compile the training step for --topology and print its memory, FLOPs, communication and "
    "lower bounds on its time; exit code 2 if it does not fit. Needs cli-jax[tpu], no TPU.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "TPUs to compile for: v5e:16x16, v5p:4x4x4, 2*v5e:16x16 for two slices; chips v4, v5e, v5p, "
    "v6e, tpu7x.",
)
_PROPOSE = flags.DEFINE_boolean(
    "dry_run_propose", True, "When the step does not fit, try what would and print it."
)
_DRY_RUN_JSON = flags.DEFINE_string("dry_run_json", "", "A file for the dry run's numbers.")
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
        if _DRY_RUN.value:
            from cli_jax.dryrun.run import dry_run  # the TPU compiler, for those who ask for it

            json_path = _DRY_RUN_JSON.value
            sys.exit(0 if dry_run(experiment, _TOPOLOGY.value, json_path, _PROPOSE.value) else 2)
        if _WORKDIR.value is None:
            raise app.UsageError("--workdir is required: the folder that collects all")
        if _DISTRIBUTED.value:
            processes.join()
        run(experiment, _WORKDIR.value)
    except EXPECTED as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
