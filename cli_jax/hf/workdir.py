"""The parameters of a training checkpoint, read box by box.

Orbax restores whole arrays; a stacked array of a large model would not fit into the memory a
conversion is allowed. Its files are plain tensorstore arrays (zarr in OCDBT), which are opened
directly here, and only the chunks that a box touches are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from cli_jax.experiment import Experiment, load_answering
from cli_jax.hf.error import ConversionError
from cli_jax.hf.source import read_json
from cli_jax.train.checkpoint import FOLDER, find_step

Box = tuple[tuple[int, int], ...]
_PART = 2**22  # numbers of a chunk that are mixed into a checksum at once


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
            with _explained(self._path):
                data = self._store[tuple(slice(*b) for b in box)].read().result()
            self._last[self._path] = held = (box, data)
        inner = tuple(
            low - at if isinstance(i, int) else slice(low - at, high - at)
            for i, (low, high), (at, _) in zip(index, wanted, box, strict=True)
        )
        return held[1][inner]

    def checksum(self) -> int:
        """The number that `train/fingerprint.py` gives the array, computed chunk by chunk."""
        corners = (range(0, n, c) for n, c in zip(self.shape, self.chunk, strict=True))
        total = 0
        for corner in itertools.product(*corners):
            box = tuple(slice(a, min(a + c, n)) for a, c, n in self._spans(corner))
            total += _mixed(self.read(box), corner, self.shape)
        return total % 2**32

    def _spans(self, corner: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        return zip(corner, self.chunk, self.shape, strict=True)


@dataclasses.dataclass(frozen=True)
class TrainingCheckpoint:
    """One step of a workdir: its config, and its parameters by path, unread."""

    workdir: Path
    step: int
    experiment: Experiment
    arrays: dict[str, StoredArray]
    checksums: dict[str, int]

    def verify(self, *, progress: bool) -> None:
        """Reads everything once; raises ConversionError if a bit is not what was saved."""
        bar = tqdm(self.arrays, desc="checking", unit="array", disable=not progress)
        wrong = [path for path in bar if self.arrays[path].checksum() != self.checksums[path]]
        if wrong:
            raise ConversionError(
                f"checkpoint {self.step} of {self.workdir} is damaged: {', '.join(wrong[:3])}"
                " differs from what was saved; choose another with --step"
            )


def open_workdir(where: str | Path, step: int | None = None) -> TrainingCheckpoint:
    """Opens a workdir (its newest step, or `step`) or one folder under its checkpoints/."""
    folder = Path(where).expanduser().absolute()
    if folder.parent.name == FOLDER and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    experiment = load_answering(folder)
    step = find_step(folder, step)
    item = folder / FOLDER / str(step)
    with _explained(str(item)):
        saved = read_json(item / "metadata" / "metadata")["arrays"]
        zarr = "zarr3" if read_json(item / "params" / "_METADATA").get("use_zarr3") else "zarr"
    paths = {key: key.removeprefix("params/") for key in saved if key.startswith("params/")}
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    last: dict[str, tuple[Box, np.ndarray]] = {}
    arrays = {}
    for path in paths.values():
        kvstore = {"driver": "ocdbt", "base": f"file://{item}/params/"}
        spec = {"driver": zarr, "kvstore": {**kvstore, "path": path.replace("/", ".") + "/"}}
        with _explained(path):
            arrays[path] = StoredArray(
                path, ts.open(spec, read=True, context=context).result(), last
            )
    checksums = {path: saved[key]["checksum"] for key, path in paths.items()}
    return TrainingCheckpoint(folder, step, experiment, arrays, checksums)


def _mixed(data: np.ndarray, corner: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The sum of train/fingerprint.py over a box of an array."""
    total, step = 0, max(1, _PART // math.prod(data.shape[1:]))
    for first in range(0, len(data), step):
        part = np.ascontiguousarray(data[first : first + step])
        place = np.zeros((1,) * part.ndim, np.uint32)
        for axis, (at, size) in enumerate(zip(corner, shape, strict=True)):
            low = at + first if axis == 0 else at
            index = np.arange(low, low + part.shape[axis], dtype=np.uint32)
            index = index.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
            place = place * np.uint32(size) + index
        bits = part.view(f"u{part.dtype.itemsize}").astype(np.uint32)
        bits ^= place * np.uint32(0x9E3779B1)
        bits *= np.uint32(0x85EBCA77)
        bits ^= bits >> np.uint32(15)
        total += int(bits.sum(dtype=np.uint64))
    return total


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """tensorstore's errors, and missing files, as one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(
            f"{what} cannot be read, the checkpoint is damaged: {str(error).splitlines()[0][:200]}"
        ) from error
