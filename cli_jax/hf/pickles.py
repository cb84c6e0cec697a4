"""`convert.py bin-to-safetensors`: torch's pickled weights -> safetensors. Needs torch.

The only place where a pickle is opened, with torch's restricted loader (`weights_only=True`), which
builds tensors and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.hf.error import ConversionError
from cli_jax.hf.source import PICKLES, SIDE_FILES
from cli_jax.hf.tensor import Tensor
from cli_jax.hf.tensorfile import BFLOAT16, DTYPES
from cli_jax.hf.write import copy_files, output_folder, write_tensors

# Training states that lie next to weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
_REOPEN_BYTES = 2**29


class TorchFiles:
    """Pickle files, one open at a time.

    A file is mapped into memory, so only what is read of it is loaded; what has been read stays,
    so after a while the file is opened afresh. Files older than torch 1.6 are loaded whole.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._tensors: Mapping[str, Any] = {}
        self._read = 0

    def open(self, file: Path) -> Mapping[str, Any]:
        mapped = _is_zip(file)
        if file != self._file or (mapped and self._read > _REOPEN_BYTES):
            self._tensors = {}  # before loading: two files are never held at once
            self._tensors, self._file, self._read = _load(file, mapped), file, 0
        return self._tensors

    def rows(self, file: Path, name: str, start: int, stop: int) -> Any:
        rows = self.open(file)[name][start:stop].detach().contiguous()
        self._read += rows.nbytes
        return rows


class TorchTensor:
    """A torch tensor in a file; bfloat16 goes through its bits, for numpy has no such type."""

    def __init__(self, files: TorchFiles, file: Path, name: str) -> None:
        tensor = files.open(file)[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        known = {dtype.name: dtype for dtype in DTYPES.values()}
        if kind not in known or not tensor.ndim:
            raise ConversionError(f"{kind} {list(tensor.shape)} is no weight")
        self.shape, self.dtype = tuple(tensor.shape), known[kind]
        self._files, self._file, self._name = files, file, name

    def read(self, start: int, stop: int) -> np.ndarray:
        import torch

        rows = self._files.rows(self._file, self._name, start, stop)
        if self.dtype == BFLOAT16:
            return rows.view(torch.int16).numpy().view(BFLOAT16)
        return rows.numpy()


def bin_to_safetensors(
    source: str | Path, out: str | Path, *, max_shard_gb: float = 5.0, progress: bool = False
) -> dict[str, str]:
    """Converts a folder's .bin/.pt files, or one file, keeping names and dtypes.

    Returns {name: why} of what was left out: buffers of integer type and the like.
    """
    path = Path(source).expanduser()
    files = TorchFiles()
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for file in [path] if path.is_file() else _pickles(path):
        for name in files.open(file):
            if name in tensors:
                raise ConversionError(f"{name} is in two files of {path}")
            try:
                tensors[name] = TorchTensor(files, file, name)
            except ConversionError as error:
                left_out[name] = str(error)
    if not tensors:
        raise ConversionError(f"{path} holds no float tensors")
    folder = path if path.is_dir() else path.parent
    with output_folder(out) as unfinished:
        copy_files([folder], ["config.json", *SIDE_FILES], unfinished)
        write_tensors(unfinished, tensors, max_shard_gb=max_shard_gb, progress=progress)
    return left_out


def _pickles(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConversionError(f"{folder} does not exist")
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in PICKLES and not file.name.startswith(_NOT_WEIGHTS)
    ]
    if not found:
        raise ConversionError(f"{folder} holds no .bin or .pt file")
    return found


def _load(file: Path, mapped: bool) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "bin-to-safetensors needs torch: pip install torch, or convert on a machine that has it"
        ) from error
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise ConversionError(
            f"{file} is refused by torch's safe loader: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(value, Mapping) or not all(torch.is_tensor(v) for v in value.values()):
        raise ConversionError(f"{file} is not a plain dictionary of tensors")
    return value


def _is_zip(file: Path) -> bool:
    """torch's format since 1.6; older files cannot be mapped."""
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"
