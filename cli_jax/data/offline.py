"""Makes the bins of a config's training data: measure every row, draw the epoch, pack, write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data.best_fit import pack
from cli_jax.data.bins import Bins, save, settings_of
from cli_jax.data.collate import Extent, Sizes
from cli_jax.data.ledger import Drop, Ledger, Tally
from cli_jax.data.measure import Measurer, measure_rows
from cli_jax.data.sample import SampleSpec
from cli_jax.data.sources import open_sources
from cli_jax.experiment import DataConfig
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.text.tokenizer import Tokenizer


def make_bins(
    data: DataConfig,
    image: ImageConfig,
    vision: VisionConfig,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    seed: int,
    extras: Extras = NO_EXTRAS,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the bins file `out`, and beside it which rows are left out; returns its `notes`.

    `extras`: what the fusion strategy adds to every picture. Raises ConfigError or DataError for
    unusable settings or files, and DataError as training would when too many rows cannot be used.
    """
    files, ranges, roots = open_sources(data)
    sizes = Sizes.from_config(data, vision, 1, extras)
    spec = SampleSpec.from_config(data, image, vision, tokenizer, extras)
    settings = settings_of(spec, data, files, ranges)
    names = [source.path for source in data.train]
    ledger = Ledger(names, ranges, sizes, max_bad_share=data.max_bad_share, strict=data.strict)
    rows, extents, drops = [], [], []
    for i, (file, span, root) in enumerate(zip(files, ranges, roots, strict=True)):
        measurer = Measurer(i, file, root, spec)
        found, left_out = _measure(measurer, range(*span), data, ledger, progress)
        rows.append(np.concatenate([each[0] for each in found]))
        extents.append(np.concatenate([each[1] for each in found]))
        drops += left_out

    copies = _epoch([len(each) for each in rows], [s.weight for s in data.train], seed)
    taken = np.concatenate([each[at] for each, at in zip(extents, copies, strict=True)])
    source = np.repeat(np.arange(len(copies)), [len(at) for at in copies])
    row = np.concatenate([each[at] for each, at in zip(rows, copies, strict=True)])
    if data.pack:
        with tqdm(total=len(row), desc="packing", unit=" samples", disable=not progress) as bar:
            offsets, order = pack(taken, sizes.row, seed, bar.update)
    else:
        offsets, order = np.arange(len(row) + 1), np.arange(len(row))
    notes = _notes(taken, offsets, sizes.row, data) | {
        "files": names,
        "rows": sum(len(each) for each in rows),
        "left_out": len(drops),
    }
    save(out, Bins(offsets, source[order], row[order], settings), notes)
    _list_drops(left_out_path(out), drops, names)
    return notes


def left_out_path(out: str | Path) -> Path:
    """Where the rows that a bins file leaves out are listed."""
    return Path(out).with_suffix(".left_out.jsonl")


def _measure(
    measurer: Measurer, rows: range, data: DataConfig, ledger: Ledger, progress: bool
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[Drop]]:
    """The usable rows with their extents, in chunks, and the drops of one source."""
    found, dropped = [], []
    name = f"measuring {measurer.file.path.name}"
    with tqdm(total=len(rows), desc=name, unit=" rows", disable=not progress) as bar:
        for good, extents, drops in measure_rows(measurer, rows, data.workers):
            tally = Tally.zero(len(data.train))
            tally.drawn[measurer.source] = len(good) + len(drops)
            tally.used[measurer.source] = len(good)
            tally.drops += drops
            ledger.add(tally)
            found.append((good, extents))
            dropped += drops
            bar.update(len(good) + len(drops))
    return found, dropped


def _epoch(lengths: Sequence[int], weights: Sequence[float], seed: int) -> list[np.ndarray]:
    """Per source the indices of its samples in one epoch, in the proportions of the weights.

    The epoch is the shortest that holds every sample: one source is gone through once, the others
    as often as the weights say, the last time through a random part of them.
    """
    per_weight = max(n / weight for n, weight in zip(lengths, weights, strict=True))
    epoch = []
    for i, (n, weight) in enumerate(zip(lengths, weights, strict=True)):
        whole, rest = divmod(max(round(weight * per_weight), n), n)
        part = np.random.default_rng([seed, 0, i]).permutation(n)[:rest]
        epoch.append(np.concatenate([np.tile(np.arange(n), whole), part]))
    return epoch


def _notes(
    taken: np.ndarray, offsets: np.ndarray, room: Extent, data: DataConfig
) -> dict[str, Any]:
    bins, samples = len(offsets) - 1, len(taken)
    used = taken.sum(0, dtype=np.int64).tolist()
    fill = {
        name: total / (size * bins) if size else 0.0
        for name, total, size in zip(Extent._fields, used, room, strict=True)
    }
    return {
        "bins": bins,
        "samples": samples,
        "fill": fill,
        "samples_per_bin": samples / bins,
        "samples_per_update": samples / bins * data.batch_size,
        "updates_per_epoch": bins / data.batch_size,
    }


def _list_drops(path: Path, drops: Sequence[Drop], names: Sequence[str]) -> None:
    """One line per row that is left out; no file if there is none."""
    path.unlink(missing_ok=True)
    if drops:
        lines = [{"file": names[drop.source], **dataclasses.asdict(drop)} for drop in drops]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
