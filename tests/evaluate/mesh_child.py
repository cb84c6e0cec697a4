"""Evaluates a workdir on four devices; started by a test, since devices are counted at start-up.

mesh_child.py FOLDER OUTPUT: all devices are one process's, or several processes' (processes.py).
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from cli_jax.analysis.gates import mean_gates
from cli_jax.evaluate.run import evaluate
from cli_jax.evaluate.workdir import open_run
from cli_jax.generate.engine import everywhere, split_rows
from cli_jax.parallel import processes

folder, output = Path(sys.argv[1]), sys.argv[2]
if processes.COUNT in os.environ:
    processes.join()
assert jax.device_count() == 4
run = open_run(folder / "run")
with run.context():
    rows = jax.jit(split_rows)({"input_ids": np.zeros((8, 3), np.int32)})["input_ids"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    whole = jax.jit(lambda x: everywhere(split_rows(x)))(np.zeros((8, 3), np.int32))
    assert whole.is_fully_replicated
    means, _ = mean_gates(
        run.model, run.params, run.experiment, folder / "questions.json", folder, batch_size=5
    )
    if jax.process_index() == 0:
        (folder / output).mkdir(exist_ok=True)
        np.save(folder / output / "gates.npy", means.mean())
    evaluate(
        run.model,
        run.params,
        run.experiment,
        folder / "questions.json",
        folder,
        folder / output,
        step=run.step,
        batch_size=5,
    )
