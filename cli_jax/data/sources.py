"""Rows on disk: a LLaVA JSON or JSONL file as a random-access sequence.

The file is checked once, when it is opened, and then only its rows' byte offsets are held; a row is
parsed when it is asked for. Millions of rows cost 16 bytes each in every worker, not a tree of
Python objects.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from array import array
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cli_jax.data.parts import PartOf, parts
from cli_jax.experiment import ConfigError, DataConfig, SourceConfig

_SPACE = re.compile(r"[ \t\n\r]*")


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file or the rows and the remedy."""


def image_root_of(path: str | os.PathLike[str], image_root: str | os.PathLike[str]) -> str:
    """The folder of a file's pictures: the one given, or where the file lies."""
    return str(image_root or Path(path).parent)


class RowError(ValueError):
    """A row that cannot be used; the message is the reason."""


class Rows(Protocol):
    """A sequence of rows, with the file that they are from."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class RowFile:
    """The rows of one file: `.jsonl` holds one row per line, any other name one JSON list.

    Raises DataError for a file that is missing, is not valid JSON (with line and byte) or is empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist or is not a file")
        self._size = self.path.stat().st_size
        if self._size == 0:
            raise DataError(f"{self.path} is empty")
        lines = self.path.suffix == ".jsonl"
        self._starts, self._stops = _index_lines(self) if lines else _index_list(self)
        if not len(self._starts):
            raise DataError(f"{self.path} holds no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row `index`, parsed anew; RowError if it is not a mapping or not UTF-8."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, no row {index}")
        raw = self._bytes[self._starts[index] : self._stops[index]]
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(f"the row is not UTF-8: {error}") from error
        if not isinstance(row, Mapping):
            raise RowError(f"the row is not a mapping: {row!r:.80}")
        return row

    @cached_property
    def _bytes(self) -> mmap.mmap:
        if self.path.stat().st_size != self._size:
            raise DataError(f"{self.path} has changed since it was opened")
        with self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        """A worker maps the file itself."""
        return {k: v for k, v in self.__dict__.items() if k != "_bytes"}

    def _broken(self, at: int, what: str) -> DataError:
        line = self._bytes[:at].count(b"\n") + 1
        return DataError(f"{self.path}, line {line} (byte {at}): not valid JSON: {what}")


def open_sources(
    data: DataConfig, part: PartOf = "train"
) -> tuple[list[Rows], list[tuple[int, int]], list[str]]:
    """Of every file of `data.train`: the file, the (start, stop) of its rows, its image root.

    `part`: the rows that are trained on, or those of the scenes that are held out.
    """
    if not data.train:
        raise ConfigError("data.train is empty: name at least one JSON or JSONL file")
    files: list[Rows] = [RowFile(source.path) for source in data.train]
    ranges = [_range(source, len(file)) for source, file in zip(data.train, files, strict=True)]
    roots = [image_root_of(source.path, source.image_root) for source in data.train]
    if data.captions or data.held_out:
        files = list(parts(files, ranges, data, part))
        ranges = [(0, len(file)) for file in files]
    return files, ranges, roots


def _range(source: SourceConfig, length: int) -> tuple[int, int]:
    start, stop = source.start, source.stop or length
    if not 0 <= start < stop <= length:
        raise ConfigError(
            f"{source.path} has {length} rows: start = {source.start}, stop = {source.stop} "
            "select none of them or more than there are"
        )
    if not source.weight > 0:
        raise ConfigError(f"{source.path}: weight {source.weight} is not positive; remove it")
    return start, stop


def _index_lines(rows: RowFile) -> tuple[np.ndarray, np.ndarray]:
    starts, stops, at = array("q"), array("q"), 0
    for line in iter(rows._bytes.readline, b""):
        text = line.strip()
        if text:
            start = at + line.index(text)
            try:
                json.loads(text.decode("latin-1"))
            except json.JSONDecodeError as error:
                raise rows._broken(start + error.pos, error.msg) from None
            starts.append(start)
            stops.append(start + len(text))
        at += len(line)
    return np.asarray(starts, np.int64), np.asarray(stops, np.int64)


def _index_list(rows: RowFile) -> tuple[np.ndarray, np.ndarray]:
    # Read as Latin-1 a character is a byte, so that the decoder's positions are file offsets; JSON
    # is the same either way outside of strings.
    text = rows._bytes[:].decode("latin-1")
    decoder, starts, stops = json.JSONDecoder(), array("q"), array("q")

    def skip(at: int) -> tuple[int, str]:
        found = _SPACE.match(text, at)
        at = found.end() if found else at
        return at, text[at : at + 1]

    at, char = skip(3 if text.startswith("\xef\xbb\xbf") else 0)  # a UTF-8 byte order mark
    if char != "[":
        raise rows._broken(at, "expected a list of rows (a file of lines is named .jsonl)")
    at, char = skip(at + 1)
    while char != "]":
        try:
            _, stop = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise rows._broken(error.pos, error.msg) from None
        starts.append(at)
        stops.append(stop)
        at, char = skip(stop)
        if char == ",":
            at, char = skip(at + 1)
            if char == "]":
                raise rows._broken(at, "a comma before the end of the list")
        elif char != "]":
            raise rows._broken(at, "expected a comma or the end of the list")
    at, char = skip(at + 1)
    if char:
        raise rows._broken(at, "text after the end of the list")
    return np.asarray(starts, np.int64), np.asarray(stops, np.int64)
