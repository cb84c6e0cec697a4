"""`convert.py bin-to-safetensors`: torch's pickled weights -> safetensors. Needs torch.

The only place where a pickle is opened, with torch's restricted loader (`weights_only=True`), which
builds tensors and nothing else. Files are mapped into memory, so only what is written is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.hf.error import ConversionError
from cli_jax.hf.source import PICKLES, SIDE_FILES
from cli_jax.hf.tensor import Tensor
from cli_jax.hf.tensorfile import BFLOAT16
from cli_jax.hf.write import copy_files, output_folder, write_tensors

# Training states that lie next to weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")


class TorchTensor:
    """A torch tensor as a `Tensor`; bfloat16 goes through its bits, numpy has no such type."""

    def __init__(self, tensor: Any) -> None:
        import torch

        kinds = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: BFLOAT16}
        if tensor.dtype not in kinds:
            raise ConversionError(f"dtype {tensor.dtype} is not supported")
        self.tensor, self.dtype = tensor, np.dtype(kinds[tensor.dtype])
        self.shape = tuple(tensor.shape)
        self._bits = torch.int16 if self.dtype == BFLOAT16 else None

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = self.tensor[start:stop].detach().contiguous()
        return (rows.view(self._bits).numpy().view(BFLOAT16)) if self._bits else rows.numpy()


def bin_to_safetensors(
    source: str | Path, out: str | Path, *, max_shard_gb: float = 5.0, progress: bool = False
) -> dict[str, str]:
    """Converts a folder's .bin/.pt files, or one file, keeping names and dtypes.

    Returns {name: why} of what was left out: buffers of integer type and the like.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else _pickles(path)
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for file in files:
        for name, value in _load(file).items():
            if name in tensors:
                raise ConversionError(f"{name} is in two files of {path}")
            try:
                if not value.ndim:
                    raise ConversionError("a scalar")
                tensors[name] = TorchTensor(value)
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


def _load(file: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "bin-to-safetensors needs torch: pip install torch, or convert on a machine that has it"
        ) from error
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        raise ConversionError(
            f"{file} is refused by torch's safe loader: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(value, Mapping) or not all(torch.is_tensor(v) for v in value.values()):
        raise ConversionError(f"{file} is not a plain dictionary of tensors")
    return value


def _is_zip(file: Path) -> bool:
    """torch's format since 1.6; older files cannot be mapped and are read whole."""
    with file.open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"
