"""The worker's half of the pipeline: draw samples, pack rows, collate batches, keep a tally.

Runs inside Grain, in the training process or in its workers. The state is exact and small: the
index of the next sample and the indices of those that wait in rows; restoring draws again from the
oldest of them on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from cli_jax.data.collate import Sizes, collate
from cli_jax.data.context import check_prompt_context
from cli_jax.data.ledger import Drop, Tally, drop_of
from cli_jax.data.packing import Keyed, Packer
from cli_jax.data.sample import Sample, SampleSpec, make_sample
from cli_jax.data.sources import DataError, Rows

FLUSH = 64  # drops after which a tally is sent without a batch, so that hopeless data is noticed


@dataclasses.dataclass(frozen=True)
class RowIndices:
    """A Grain source of (source, row) pairs: reading is left to the workers."""

    source: int
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self.source, row


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a (source, row) pair became: a sample or a drop."""

    source: int
    sample: Sample | None
    drop: Drop | None


@dataclasses.dataclass(frozen=True)
class Draw(grain.transforms.RandomMap):
    """Reads a row and makes its sample; a row that cannot be used becomes a drop."""

    files: Sequence[Rows]
    roots: Sequence[str]
    spec: SampleSpec
    prompt_context: bool

    def random_map(self, element: tuple[int, int], rng: np.random.Generator) -> Drawn:
        source, index = element
        row_id = ""
        try:
            row = self.files[source][index]
            row_id = str(row.get("id", ""))
            sample = make_sample(row, self.roots[source], self.spec, rng)
        except Exception as error:
            drop = drop_of(error, source, index, row_id)
            if drop is None:
                error.add_note(f"in row {index} (id {row_id!r}) of {self.files[source].path}")
                raise
            return Drawn(source, None, drop)
        if self.prompt_context:
            check_prompt_context(sample)
        return Drawn(source, sample, None)


def add_used(tally: Tally, rows: Sequence[Sequence[Sample]]) -> None:
    """Books what finished rows hold."""
    tally.rows += len(rows)
    for sample in itertools.chain.from_iterable(rows):
        tally.tokens += sample.extent.tokens
        tally.visual += sample.extent.visual
        tally.tiles += sample.extent.tiles


class PackedBatches(grain.IterDataset):
    """Packs a stream of Drawn into batches: {"batch": Batch or {}, "tally": JSON}."""

    def __init__(self, parent: grain.IterDataset, sizes: Sizes, sources: int, open_rows: int):
        super().__init__(parent)
        self._sizes, self._sources, self._open_rows = sizes, sources, open_rows

    def __iter__(self) -> PackedBatchesIterator:
        packer = Packer(self._sizes.row, self._open_rows)
        return PackedBatchesIterator(iter(self._parent), packer, self._sizes, self._sources)


class PackedBatchesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, packer: Packer, sizes: Sizes, sources: int):
        super().__init__(parent)
        self._packer, self._sizes = packer, sizes
        self._tally = Tally.zero(sources)
        self._finished: list[list[Keyed]] = []  # rows that wait for their batch
        self._next = 0

    def __next__(self) -> dict[str, Any]:
        while len(self._finished) < self._sizes.rows and len(self._tally.drops) < FLUSH:
            drawn, key = next(self._parent), self._next
            self._next += 1
            self._tally.drawn[drawn.source] += 1
            if drawn.sample is None:
                self._tally.drops.append(drawn.drop)
                continue
            self._tally.used[drawn.source] += 1
            row = self._packer.place(key, drawn.sample)
            if row is not None:
                self._finished.append(row)
        batch: dict[str, Any] = {}
        if len(self._finished) == self._sizes.rows:
            batch = self._collate()
        tally, self._tally = self._tally, Tally.zero(len(self._tally.drawn))
        # As JSON the tally is one leaf for Grain, which maps over containers.
        return {"batch": batch, "tally": json.dumps(dataclasses.asdict(tally))}

    def _collate(self) -> dict[str, Any]:
        rows = [[sample for _, sample in row] for row in self._finished]
        self._finished = []
        add_used(self._tally, rows)
        return dict(collate(rows, self._sizes))

    def get_state(self) -> dict[str, Any]:
        rows = [*self._finished, *self._packer.rows]
        return {
            "next": self._next,
            "waiting": [[key for key, _ in row] for row in rows],
            "closed": len(self._finished),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        waiting = {key: i for i, row in enumerate(state["waiting"]) for key in row}
        rows: list[list[Keyed]] = [[] for _ in state["waiting"]]
        self._next = min(waiting, default=state["next"])
        grain.experimental.set_next_index(self._parent, self._next)
        while self._next < state["next"]:
            drawn, key = next(self._parent), self._next
            self._next += 1
            if key not in waiting:
                continue
            if drawn.sample is None:
                raise DataError(
                    f"row {drawn.drop.row} (id {drawn.drop.id!r}) was in use when the checkpoint "
                    f"was written and is not now: {drawn.drop.reason}"
                )
            rows[waiting[key]].append((key, drawn.sample))
        self._finished, self._packer.rows = rows[: state["closed"]], rows[state["closed"] :]
        self._tally = Tally.zero(len(self._tally.drawn))
