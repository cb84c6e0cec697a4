"""What every row of a file takes of a bin, measured in processes without decoding a picture."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cli_jax.data.collate import Extent
from cli_jax.data.ledger import Drop, drop_of
from cli_jax.data.sample import SampleSpec, measure
from cli_jax.data.sources import Rows

CHUNK = 256  # rows that a process measures at a time


@dataclasses.dataclass(frozen=True)
class Measurer:
    """Measures the rows of one source; travels to the processes."""

    source: int
    file: Rows
    root: str
    spec: SampleSpec

    def __call__(self, row: int) -> Extent | Drop:
        """The row's extent, or why it cannot be used."""
        row_id = ""
        try:
            content = self.file[row]
            row_id = str(content.get("id", ""))
            return measure(content, self.root, self.spec)
        except Exception as error:
            drop = drop_of(error, self.source, row, row_id)
            if drop is None:
                error.add_note(f"in row {row} (id {row_id!r}) of {self.file.path}")
                raise
            return drop

    def chunk(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, list[Drop]]:
        """The usable rows of start:stop, their extents [rows, dimensions], and the other rows."""
        results = {row: self(row) for row in range(start, stop)}
        good = {row: each for row, each in results.items() if isinstance(each, Extent)}
        drops = [each for each in results.values() if isinstance(each, Drop)]
        extents = np.array(list(good.values()), np.int32).reshape(-1, len(Extent._fields))
        return np.array(list(good), np.int64), extents, drops


def measure_rows(
    measurer: Measurer, rows: range, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[Drop]]]:
    """The chunks of `rows`, in order, from `workers` processes; 0 = in this one."""
    starts = rows[::CHUNK]
    stops = [min(at + CHUNK, rows.stop) for at in starts]
    if not workers:
        yield from map(measurer.chunk, starts, stops)
        return
    # Not forked: a process that has loaded jax has threads, which a fork would tear.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_keep, initargs=(measurer,)
    ) as pool:
        try:
            yield from pool.map(_kept_chunk, starts, stops)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_kept: dict[str, Callable[..., Any]] = {}  # of a process: it is sent once, not with every chunk


def _keep(measurer: Measurer) -> None:
    _kept["chunk"] = measurer.chunk


def _kept_chunk(start: int, stop: int) -> Any:
    return _kept["chunk"](start, stop)
