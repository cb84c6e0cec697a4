"""Safetensors files, read and written in pieces.

The library maps whole files into memory and wants all tensors of a file at once to write it. A
conversion must not: here a tensor is read by rows with plain reads and written block by block, so
that memory stays at one block whatever the size of the file. The format is eight bytes of header
length, a JSON header, and the raw little-endian data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from cli_jax.hf.error import ConversionError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; nothing is read before `read`."""

    file: Path
    name: str
    code: str  # the format's dtype name
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        if self.code not in DTYPES:
            raise ConversionError(
                f"{self.name} in {self.file} has dtype {self.code}; only {', '.join(DTYPES)} are"
                " supported: convert the checkpoint to one of them first"
            )
        return DTYPES[self.code]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the leading axis."""
        row = math.prod(self.shape[1:])
        data = np.fromfile(
            self.file,
            self.dtype,
            count=(stop - start) * row,
            offset=self.offset + start * row * self.dtype.itemsize,
        )
        return data.reshape((stop - start, *self.shape[1:]))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Lists a file's tensors; a file that is cut short or is no safetensors file is refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ConversionError(
                f"{path} is no safetensors file, or was cut short: fetch it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {
            name: StoredTensor(
                path,
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} has a broken safetensors header: {error!r}") from error
    for entry in entries.values():
        if entry.offset + entry.nbytes > size:
            raise ConversionError(
                f"{path} was cut short: {entry.name} ends at byte {entry.offset + entry.nbytes},"
                f" the file at {size}; fetch it again"
            )
        dtype = DTYPES.get(entry.code)
        if dtype is not None and math.prod(entry.shape) * dtype.itemsize != entry.nbytes:
            raise ConversionError(f"{path}: the header gives {entry.name} a wrong size")
    return entries


def write_file(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype, Iterable[np.ndarray]]],
) -> None:
    """Writes (name, shape, dtype, blocks of rows) streams as one file and flushes it to disk.

    Wider dtypes come first, as the library orders them: every tensor stays aligned.
    """
    ordered = sorted(tensors, key=lambda t: -t[2].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype, _ in ordered:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape, dtype, blocks in ordered:
            written = sum(_write_block(file, block, dtype) for block in blocks)
            if written != math.prod(shape) * dtype.itemsize:
                raise AssertionError(f"{name}: {written} bytes written for shape {shape} {dtype}")
        file.flush()
        os.fsync(file.fileno())


def _write_block(file: BinaryIO, block: np.ndarray, dtype: np.dtype) -> int:
    if block.dtype != dtype:
        raise AssertionError(f"block of {block.dtype} in a tensor of {dtype}")
    return file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
