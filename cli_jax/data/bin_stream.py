"""Batches from offline-packed bins: their order depends on the seed, and on nothing else.

The bins of epoch e are a permutation by (seed, e). Of the endless sequence of epochs, global batch
b is bins b*B to (b+1)*B; a process takes its share of every batch, a worker every workers-th batch.
So neither decides what is in a batch, and the position is one number for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import grain
import numpy as np

from cli_jax.data.bins import Bins
from cli_jax.data.collate import Extent, Sizes, collate
from cli_jax.data.ledger import Drop, Tally
from cli_jax.data.stream import Draw, Drawn, add_used

# A whole batch is read at a time, so few are held.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
_BATCHES_PER_WORKER = 1


@dataclasses.dataclass(frozen=True)
class DrawBin(grain.transforms.RandomMap):
    """Draws the samples of a bin; one that cannot be used leaves its place empty."""

    bins: Bins
    draw: Draw
    room: Extent

    def random_map(self, element: int, rng: np.random.Generator) -> list[Drawn]:
        free, found = np.array(self.room), []
        members = self.bins[element]
        # A generator for each: what one sample draws must not depend on whether another is sound.
        seeds = rng.integers(2**63, size=len(members)).tolist()
        for (source, row), seed in zip(members, seeds, strict=True):
            drawn = self.draw.random_map((source, row), np.random.default_rng(seed))
            sample = drawn.sample
            if sample is not None and (free < sample.extent).any():
                reason = "it takes more room than when the bins were made; make them again"
                drawn = Drawn(source, None, Drop(source, row, sample.id, False, "grown", reason))
            elif sample is not None:
                free -= sample.extent
            found.append(drawn)
        return found


class Batches(grain.MapDataset):
    """Element b is a process' part of global batch b: {"batch": Batch, "tally": JSON}."""

    def __init__(
        self, parent: grain.MapDataset, sizes: Sizes, sources: int, process: tuple[int, int]
    ):
        super().__init__(parent)
        self._sizes, self._sources = sizes, sources
        self._index, self._count = process

    def __len__(self) -> int:
        return sys.maxsize // (self._sizes.rows * self._count)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        rows = self._sizes.rows
        first = (index * self._count + self._index) * rows
        drawn = [self._parent[first + row] for row in range(rows)]
        samples = [[each.sample for each in bin if each.sample is not None] for bin in drawn]
        tally = Tally.zero(self._sources)
        for each in (each for bin in drawn for each in bin):
            tally.drawn[each.source] += 1
            if each.drop is not None:
                tally.drops.append(each.drop)
            else:
                tally.used[each.source] += 1
        add_used(tally, samples)
        return {
            "batch": dict(collate(samples, self._sizes)),
            "tally": json.dumps(dataclasses.asdict(tally)),
        }


class BatchIterator(grain.DatasetIterator):
    """Batches from any position on, which is the whole state: the number of batches so far.

    Grain's own state holds a position per worker; here the workers start at the position, so their
    number may change. A state is the same on every process.
    """

    def __init__(self, batches: grain.MapDataset, workers: int):
        super().__init__()
        self._batches, self._workers = batches, workers
        self._next = 0
        self._stream: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, Any]:
        self._assert_not_closed()
        element = next(self._started())
        self._next += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"batch": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._next = state["batch"]

    def start_prefetch(self) -> None:
        self._started().start_prefetch()

    def close(self) -> None:
        super().close()
        self._stop()

    def _started(self) -> grain.DatasetIterator:
        if self._stream is None:
            stream = self._batches[self._next :].to_iter_dataset(_READ)
            if self._workers:
                stream = stream.mp_prefetch(
                    grain.MultiprocessingOptions(
                        num_workers=self._workers, per_worker_buffer_size=_BATCHES_PER_WORKER
                    )
                )
            self._stream = iter(stream)
        return self._stream

    def _stop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def make_batches(
    bins: Bins, draw: Draw, sizes: Sizes, process: tuple[int, int], seeds: tuple[int, int]
) -> Batches:
    """The endless batches of process (index, count); `seeds`: of the order, of what is drawn."""
    order = grain.MapDataset.range(len(bins)).shuffle(seed=seeds[0]).repeat()
    drawn = order.random_map(DrawBin(bins, draw, sizes.row), seed=seeds[1])
    return Batches(drawn, sizes, len(draw.files), process)
