"""The books of the data pipeline: what was drawn, used and dropped, and when to stop.

Workers report tallies with their batches; the ledger adds them up in the main process. A dropped
row is counted and logged once, however often it is drawn: every source has a bitmap of its rows.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cli_jax.data.collate import Sizes
from cli_jax.data.sample import TooLong
from cli_jax.data.sources import DataError, RowError
from cli_jax.image.errors import ImageError
from cli_jax.text.conversation import ConversationError

logger = logging.getLogger(__name__)

FIRST_REASONS = 10  # kept for error messages and reports
HOPELESS = 1000  # rows drawn from a source without a usable one


@dataclasses.dataclass(frozen=True)
class Drop:
    """A row that became no sample. `kind` groups the reasons."""

    source: int
    row: int
    id: str
    too_long: bool  # it is sound, but no row can hold it
    kind: str
    reason: str


_KINDS = {RowError: "row", ConversationError: "conversation", ImageError: "image"}


def drop_of(error: Exception, source: int, row: int, row_id: str) -> Drop | None:
    """The drop of a row that raised `error`; None if that is no fault of the row."""
    if isinstance(error, TooLong):
        return Drop(source, row, row_id, True, error.dimension, str(error))
    for kind, name in _KINDS.items():
        if isinstance(error, kind):
            return Drop(source, row, row_id, False, name, str(error))
    return None


@dataclasses.dataclass
class Tally:
    """What happened since the last one; travels from a worker to the ledger."""

    drawn: list[int]  # per source
    used: list[int]
    drops: list[Drop] = dataclasses.field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    visual: int = 0
    tiles: int = 0

    @classmethod
    def zero(cls, sources: int) -> Tally:
        return cls([0] * sources, [0] * sources)


class Ledger:
    """Adds up tallies; `add` raises DataError when too much of a source is unusable.

    names: path of every source; ranges: its rows that are in use, as (start, stop), of which every
    one of `processes` draws its share.
    """

    def __init__(
        self,
        names: Sequence[str],
        ranges: Sequence[tuple[int, int]],
        sizes: Sizes,
        *,
        max_bad_share: float,
        strict: bool,
        processes: int = 1,
    ):
        self._names, self._sizes = list(names), sizes
        self._starts = [start for start, _ in ranges]
        self._lengths = [stop - start for start, stop in ranges]
        self._max_bad_share, self._strict, self._processes = max_bad_share, strict, processes
        self._sum = Tally.zero(len(names))
        self._dropped = [np.zeros(n, bool) for n in self._lengths]
        self._bad = [0] * len(names)
        self._kinds: dict[str, dict[str, int]] = {"skipped": {}, "too_long": {}}
        self._first: list[str] = []

    def add(self, tally: Tally) -> None:
        """Adds one tally and logs the rows that are dropped for the first time."""
        total = self._sum
        total.drawn = [a + b for a, b in zip(total.drawn, tally.drawn, strict=True)]
        total.used = [a + b for a, b in zip(total.used, tally.used, strict=True)]
        for field in ("rows", "tokens", "visual", "tiles"):
            setattr(total, field, getattr(total, field) + getattr(tally, field))
        for drop in tally.drops:
            at = drop.row - self._starts[drop.source]
            if not self._dropped[drop.source][at]:
                self._dropped[drop.source][at] = True
                self._book(drop)
        for source in {drop.source for drop in tally.drops}:
            self._check(source)

    def _book(self, drop: Drop) -> None:
        place = f"{self._names[drop.source]}: row {drop.row} (id {drop.id!r})"
        kinds = self._kinds["too_long" if drop.too_long else "skipped"]
        kinds[drop.kind] = kinds.get(drop.kind, 0) + 1
        if len(self._first) < FIRST_REASONS:
            self._first.append(f"{place}: {drop.reason}")
        if drop.too_long:
            logger.info("%s is too long: %s", place, drop.reason)
            return
        logger.warning("%s skipped: %s", place, drop.reason)
        self._bad[drop.source] += 1
        if self._strict:
            raise DataError(f"{place}: {drop.reason} (data.strict is set)")

    def _check(self, source: int) -> None:
        name, rows, bad = self._names[source], self._lengths[source], self._bad[source]
        drawn, used = self._sum.drawn[source], self._sum.used[source]
        # What this process has met, in later epochs more than a share; never fewer than that share.
        met = max(min(drawn, rows), -(-rows // self._processes))
        reasons = "".join(f"\n  {line}" for line in self._first)
        if bad > self._max_bad_share * met:
            raise DataError(
                f"{name}: {bad} of {met} rows cannot be used, more than data.max_bad_share = "
                f"{self._max_bad_share}; repair them or raise it. First reasons:{reasons}"
            )
        if used == 0 and drawn >= min(rows, HOPELESS):
            raise DataError(
                f"{name}: none of the first {drawn} rows drawn can be used; check image_root and "
                f"data.row_length, visual_per_row, tiles_per_row, text_per_row. First reasons:"
                f"{reasons}"
            )

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs, in plain JSON types."""
        total = self._sum
        return {
            "names": self._names,
            "lengths": self._lengths,
            "row_sizes": list(self._sizes.row),
            "drawn": total.drawn,
            "used": total.used,
            "rows": total.rows,
            "filled": [total.tokens, total.visual, total.tiles],
            "bad": self._bad.copy(),
            "skipped": self._kinds["skipped"].copy(),
            "too_long": self._kinds["too_long"].copy(),
            "first": self._first.copy(),
            "dropped": [_pack(bits) for bits in self._dropped],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up the books of `state`, which must be about the same sources."""
        self._sum = Tally(
            list(state["drawn"]), list(state["used"]), [], state["rows"], *state["filled"]
        )
        self._bad = list(state["bad"])
        self._kinds = {kind: dict(state[kind]) for kind in ("skipped", "too_long")}
        self._first = list(state["first"])
        self._dropped = [
            _unpack(text, n) for text, n in zip(state["dropped"], self._lengths, strict=True)
        ]


def report(state: Mapping[str, Any]) -> dict[str, Any]:
    """The books in a loader's state, for people: counts, reasons and fill rates.

    drawn, used   rows drawn (every epoch anew) and made into samples
    skipped       unusable rows by kind of reason, each row once; skipped_rows is their sum
    too_long      rows dropped by the dimension they exceed, each once; too_long_rows likewise
    rows          packed rows; fill_* is the share of their tokens, visual slots and tiles in use
    first         the first reasons; epochs: how often each source was gone through
    """
    books = state["ledger"]
    rows, (length, visual, tiles, *_) = books["rows"], books["row_sizes"]
    tokens_used, visual_used, tiles_used = books["filled"]

    def share(used: int, size: int) -> float:
        return used / (rows * size) if rows * size else 0.0

    return {
        "drawn": sum(books["drawn"]),
        "used": sum(books["used"]),
        "skipped_rows": sum(books["skipped"].values()),
        "skipped": dict(books["skipped"]),
        "too_long_rows": sum(books["too_long"].values()),
        "too_long": dict(books["too_long"]),
        "rows": rows,
        "fill_tokens": share(tokens_used, length),
        "fill_visual": share(visual_used, visual),
        "fill_tiles": share(tiles_used, tiles),
        "epochs": {
            name: drawn / n
            for name, drawn, n in zip(books["names"], books["drawn"], books["lengths"], strict=True)
        },
        "first": list(books["first"]),
    }


def _pack(bits: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode("ascii")


def _unpack(text: str, n: int) -> np.ndarray:
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(packed, count=n).astype(bool)
