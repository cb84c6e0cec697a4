"""Evaluates a workdir on four devices; started by a test, since devices are counted at start-up."""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np

from cli_jax.evaluate.run import evaluate
from cli_jax.evaluate.workdir import open_run
from cli_jax.generate.engine import split_rows

folder = Path(sys.argv[1])
run = open_run(folder / "run")
with run.context():
    rows = jax.jit(split_rows)({"input_ids": np.zeros((8, 3), np.int32)})["input_ids"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
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
