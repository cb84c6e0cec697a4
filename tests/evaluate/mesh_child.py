"""Evaluates a workdir on four devices; started by a test, since devices are counted at start-up."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from cli_jax.evaluate.run import evaluate
from cli_jax.evaluate.workdir import open_run

folder = Path(sys.argv[1])
run = open_run(folder / "run")
with run.context():
    evaluate(
        run.model,
        run.params,
        run.experiment,
        folder / "questions.json",
        folder,
        folder / "mesh",
        step=run.step,
        batch_size=5,
    )
