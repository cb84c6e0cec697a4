"""The parameters of a training checkpoint, read box by box.

Orbax restores whole arrays; a stacked array of a large model would not fit into the memory a
conversion is allowed. Its files are plain tensorstore arrays (zarr in OCDBT), which are opened
directly here, and only the chunks that a box touches are read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tensorstore as ts

from cli_jax.experiment import Experiment, load
from cli_jax.hf.source import read_json
from cli_jax.train.checkpoint import FOLDER, find_step, stored_arrays

Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class TrainingCheckpoint:
    """One step of a workdir: its config and its parameters by path, unread."""

    workdir: Path
    step: int
    experiment: Experiment
    arrays: dict[str, StoredArray]


class StoredArray:
    """A parameter on disk. The last chunks read are kept, for the rows asked for next."""

    def __init__(self, path: str, store: ts.TensorStore, last: dict[str, tuple[Box, np.ndarray]]):
        self._path, self._store, self._last = path, store, last
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        chunk = store.chunk_layout.read_chunk.shape or self.shape
        self.chunk = tuple(c or n for c, n in zip(chunk, self.shape, strict=True))

    def read(self, index: tuple[slice | int, ...]) -> np.ndarray:
        wanted = [
            (i, i + 1) if isinstance(i, int) else i.indices(n)[:2]
            for i, n in zip(index, self.shape, strict=True)
        ]
        box = tuple(
            (low // c * c, min(-(-high // c) * c, n))
            for (low, high), c, n in zip(wanted, self.chunk, self.shape, strict=True)
        )
        held = self._last.get(self._path)
        if held is None or held[0] != box:
            self._last.clear()  # before reading: two boxes are never held at once
            data = self._store[tuple(slice(*b) for b in box)].read().result()
            self._last[self._path] = held = (box, data)
        inner = tuple(
            low - at if isinstance(i, int) else slice(low - at, high - at)
            for i, (low, high), (at, _) in zip(index, wanted, box, strict=True)
        )
        return held[1][inner]


def open_workdir(where: str | Path, step: int | None = None) -> TrainingCheckpoint:
    """Opens a workdir (its newest step, or `step`) or one folder under its checkpoints/."""
    folder = Path(where).expanduser().absolute()
    if folder.parent.name == FOLDER and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    experiment = load(folder)
    step = find_step(folder, step)
    shapes = stored_arrays(folder, step)
    params = folder / FOLDER / str(step) / "params"
    zarr = "zarr3" if read_json(params / "_METADATA").get("use_zarr3") else "zarr"
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    last: dict[str, tuple[Box, np.ndarray]] = {}
    arrays = {}
    for path in shapes:
        kvstore = {
            "driver": "ocdbt",
            "base": f"file://{params}/",
            "path": path.replace("/", ".") + "/",
        }
        spec = {"driver": zarr, "kvstore": kvstore}
        arrays[path] = StoredArray(path, ts.open(spec, read=True, context=context).result(), last)
    return TrainingCheckpoint(folder, step, experiment, arrays)
