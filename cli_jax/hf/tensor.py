"""A tensor that is read by rows, wherever it lives; and what conversions do with such tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from cli_jax.hf.error import ConversionError

BLOCK_BYTES = 32 * 2**20


class Tensor(Protocol):
    """At least one axis; `read(start, stop)` returns those rows of the leading axis."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


def spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of about `BLOCK_BYTES` that cover the tensor."""
    row = max(1, math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row)
    for start in range(0, tensor.shape[0], step):
        yield start, min(start + step, tensor.shape[0])


def blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    for start, stop in spans(tensor):
        yield tensor.read(start, stop)


def nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


class Cast:
    """The tensor in another dtype; a finite value that becomes infinite is an error."""

    def __init__(self, name: str, tensor: Tensor, dtype: np.dtype) -> None:
        self.name, self.tensor, self.dtype = name, tensor, dtype
        self.shape = tensor.shape
        self.lossy = False  # known once everything has been read

    def read(self, start: int, stop: int) -> np.ndarray:
        block = self.tensor.read(start, stop)
        with np.errstate(over="ignore"):
            cast = block.astype(self.dtype)
        wide, back = block.astype(np.float32), cast.astype(np.float32)
        if not np.array_equal(np.isfinite(wide), np.isfinite(back)):
            raise ConversionError(
                f"{self.name} has values that {self.dtype} cannot hold"
                f" (largest {np.nanmax(np.abs(wide)):.4g}): use --dtype bfloat16 or float32"
            )
        self.lossy |= not np.array_equal(wide, back, equal_nan=True)
        return cast


class PaddedVocabulary:
    """A vocabulary matrix [vocab, D] with rows appended, each the mean of the rows before.

    The mean row's logit is the mean of all the logits, so an appended token is never the most
    likely one, tied or not; a row of zeros would be, wherever all true logits are negative.
    """

    def __init__(self, tensor: Tensor, rows: int) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self.shape = (rows, *tensor.shape[1:])
        self._mean: np.ndarray | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        known = self.tensor.shape[0]
        parts = []
        if start < known:
            parts.append(self.tensor.read(start, min(stop, known)))
        if stop > known:
            count = stop - max(start, known)
            parts.append(np.repeat(self._mean_row()[None], count, axis=0))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _mean_row(self) -> np.ndarray:
        if self._mean is None:
            total = np.zeros(self.shape[1:], np.float64)
            for block in blocks(self.tensor):
                total += block.sum(axis=0, dtype=np.float64)
            self._mean = (total / self.tensor.shape[0]).astype(self.dtype)
        return self._mean


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold equal numbers, whatever their dtypes."""
    if a.shape != b.shape:
        return False
    return all(
        np.array_equal(
            a.read(*span).astype(np.float32), b.read(*span).astype(np.float32), equal_nan=True
        )
        for span in spans(a)
    )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values; as float32, so that the dtype does not matter.

    Tensors are read in the order given; the result does not depend on it.
    """
    lines = []
    for name, tensor in tensors.items():
        values = hashlib.sha256()
        for block in blocks(tensor):
            float32 = np.ascontiguousarray(block, np.dtype("<f4"))
            values.update(float32.reshape(-1).view(np.uint8).data)
        lines.append(f"{name} {list(tensor.shape)} {values.hexdigest()}\n")
    return f"sha256:{hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()}"
