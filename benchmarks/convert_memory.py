"""Peak memory of `convert.py` on generated checkpoints of 1B and 3B parameters.

    python -m benchmarks.convert_memory                     # from-hf, 1B and 3B
    python -m benchmarks.convert_memory --to_hf             # to-hf too
    python -m benchmarks.convert_memory --sizes 1B --bin    # bin-to-safetensors too (needs torch)

Writes random weights in a temporary folder (up to 30 GB for 3B with --to_hf; --folder says where),
runs each conversion in a process of its own and prints its peak resident memory next to the bound:
1.5 GB plus the largest tensor. Exit code 1 if one is above.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.hf import names
from cli_jax.hf.config import ONEVISION_PINPOINTS
from cli_jax.hf.config_out import config_json
from cli_jax.hf.tensorfile import BFLOAT16
from cli_jax.hf.write import write_json, write_tensors

ROOT = Path(__file__).resolve().parents[1]
BOUND_GB = 1.5
VISION = VisionConfig()
IMAGE = ImageConfig(grid_pinpoints=ONEVISION_PINPOINTS)
SIZES = {
    "1B": TextConfig(vocab_size=152_000),  # LLaVA-OneVision 0.5B: 0.9B in all
    "3B": TextConfig("qwen2", 152_000, 2048, 11_008, 36, 16, 2, 128),  # Qwen2.5-3B: 3.5B in all
}
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


class Noise:
    """A tensor of random numbers that is never held whole."""

    _block = np.random.default_rng(0).standard_normal(2**22, np.float32) * 0.02

    def __init__(self, shape: tuple[int, ...], dtype: Any = BFLOAT16) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        shape = (stop - start, *self.shape[1:])
        return np.resize(self._block.astype(self.dtype), shape)


def generate(folder: Path, size: str) -> None:
    """A sharded llava-hf checkpoint in bfloat16."""
    text = SIZES[size]
    folder.mkdir()
    shapes = names.expected(VISION, text, has_newline=True)
    stored = {names.hub(name): Noise(shape) for name, shape in shapes.items()}
    write_tensors(folder, stored, max_shard_gb=2.0, progress=False)
    config = config_json(VISION, text, IMAGE, has_newline=True, dtype="bfloat16", tokens={})
    write_json(folder / "config.json", config)


def generate_bin(folder: Path, size: str) -> None:
    """The same as two pickles of torch, as large as they come."""
    text = SIZES[size]
    import torch

    folder.mkdir()
    config = config_json(VISION, text, IMAGE, has_newline=True, dtype="bfloat16", tokens={})
    write_json(folder / "config.json", config)
    shapes = list(names.expected(VISION, text, has_newline=True).items())
    for part in range(2):
        state = {
            names.hub(name): torch.randn(shape).mul_(0.02).bfloat16()
            for name, shape in shapes[part::2]
        }
        torch.save(state, folder / f"pytorch_model-{part + 1:05d}-of-00002.bin")


def generate_workdir(folder: Path, size: str) -> None:
    """A workdir with one checkpoint of a CLI model in float32, laid out as training lays it out.

    Orbax itself needs the whole state in memory, three times over; here it is written in pieces.
    """
    import jax
    import tensorstore as ts
    from flax import linen as nn
    from flax.traverse_util import flatten_dict

    from cli_jax import batch, experiment
    from cli_jax.fusion import registry
    from cli_jax.hf.workdir import StoredArray
    from cli_jax.model import vlm
    from cli_jax.train.checkpoint import FOLDER

    model = ModelConfig(VISION, SIZES[size], IMAGE, "cli", registry.get("cli").Config())
    sections = {f.name: f.type for f in dataclasses.fields(experiment.Experiment)}
    defaults = {
        name: getattr(experiment, str(kind))()
        for name, kind in sections.items()
        if str(kind).endswith("Config") and name != "model"
    }
    run = experiment.Experiment(name="benchmark", model=model, **defaults)
    one = batch.empty(
        rows=1, length=8, visual=4, tiles=1, images=1, tile_size=384, patches=VISION.num_patches
    )
    init = vlm.build(model, run.compute).init
    shapes = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), dict(one))["params"])
    leaves = flatten_dict(shapes, sep="/")

    step = folder / FOLDER / "1"
    (step / "params").mkdir(parents=True)
    (step / "metadata").mkdir()
    write_json(folder / "config.json", experiment.to_dict(run))
    write_json(step / "params" / "_METADATA", {"use_zarr3": False})
    arrays = {}
    for path, leaf in leaves.items():
        chunk = _chunk(leaf.shape, stacked="/layers/" in path)
        kvstore = {"driver": "ocdbt", "base": f"file://{step}/params/"}
        spec = {
            "driver": "zarr",
            "kvstore": {**kvstore, "path": path.replace("/", ".") + "/"},
            "metadata": {"chunks": chunk, "compressor": {"id": "zstd", "level": 1}},
        }
        store = ts.open(spec, create=True, dtype="float32", shape=leaf.shape).result()
        for start in range(0, leaf.shape[0], chunk[0]):
            stop = min(start + chunk[0], leaf.shape[0])
            store[start:stop].write(Noise(leaf.shape, np.float32).read(start, stop)).result()
        checksum = StoredArray(path, store, {}).checksum()
        arrays[f"params/{path}"] = {"shape": leaf.shape, "checksum": checksum}
    write_json(step / "metadata" / "metadata", {"arrays": arrays})


def _chunk(shape: tuple[int, ...], *, stacked: bool) -> list[int]:
    from cli_jax.train.pieces import PIECE_BYTES

    chunk = list(shape)
    if stacked and np.prod(chunk) * 4 > PIECE_BYTES:
        chunk[0] = 1
    while np.prod(chunk) * 4 > PIECE_BYTES:
        axis = int(np.argmax(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return chunk


GENERATORS = {"from-hf": generate, "bin-to-safetensors": generate_bin, "to-hf": generate_workdir}


def measure(arguments: list[str]) -> tuple[float, float]:
    """(peak resident GB, seconds) of `python convert.py ARGUMENTS`."""
    start = time.monotonic()
    command = [sys.executable, str(ROOT / "convert.py"), *arguments, "--quiet"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--to_hf", action="store_true", help="measure to-hf too")
    parser.add_argument("--bin", action="store_true", help="measure bin-to-safetensors too")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--generate", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        command, size, folder = options.generate
        GENERATORS[command](Path(folder), size)
        return 0

    rows = []
    for size in options.sizes:
        text = SIZES[size]
        shapes = names.expected(VISION, text, has_newline=True).values()
        parameters = sum(int(np.prod(s)) for s in shapes)
        largest = max(int(np.prod(s)) for s in shapes)
        work = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=options.folder))
        source, out = work / "in", work / "out"
        commands = ["from-hf"]
        commands += ["bin-to-safetensors"] if options.bin else []
        commands += ["to-hf"] if options.to_hf else []
        try:
            for command in commands:
                itemsize = 4 if command == "to-hf" else 2  # float32 masters, bfloat16 releases
                # In a process of its own: a child's peak is at least its parent's size at the fork.
                subprocess.run(
                    [sys.executable, "-m", __spec__.name, "--generate", command, size, str(source)],
                    check=True,
                    env=ENVIRONMENT,
                    cwd=ROOT,
                )
                peak, seconds = measure([command, str(source), str(out)])
                bound = BOUND_GB + largest * itemsize / 1e9
                rows.append((command, size, parameters, largest * itemsize, peak, bound, seconds))
                shutil.rmtree(source)
                shutil.rmtree(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{'command':20} {'size':4} {'parameters':>14} {'largest tensor':>14} {'peak':>8} bound")
    for command, size, parameters, nbytes, peak, bound, seconds in rows:
        print(
            f"{command:20} {size:4} {parameters:>14,} {nbytes / 1e9:>11.2f} GB {peak:>5.2f} GB"
            f" {bound:.2f} GB  {'ok' if peak <= bound else 'TOO MUCH'}  ({seconds:.0f} s)"
        )
    return 0 if all(row[4] <= row[5] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
