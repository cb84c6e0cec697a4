"""A bins file: which samples share a row, and the settings under which they fit.

One npz without pickles: `bin_offsets` [bins + 1], `source` and `row` [samples] (bin b holds the
samples bin_offsets[b]:bin_offsets[b+1]), and `metadata`, a JSON string.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.data.sample import SampleSpec
from cli_jax.data.sources import DataError, Rows
from cli_jax.experiment import ConfigError, DataConfig
from cli_jax.image.extras import Extras

COMMAND = "python -m cli_jax.data.prepare --config CONFIG --out BINS.npz"
_ARRAYS = ("bin_offsets", "source", "row")


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """The bins of one epoch; indexing gives the (source, row) pairs of a bin."""

    bin_offsets: np.ndarray
    source: np.ndarray
    row: np.ndarray
    settings: Mapping[str, Any]  # see `settings_of`

    def __len__(self) -> int:
        return len(self.bin_offsets) - 1

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        at = slice(self.bin_offsets[index], self.bin_offsets[index + 1])
        return list(zip(self.source[at].tolist(), self.row[at].tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """Of the contents: equal bins give equal batches."""
        digest = hashlib.sha256()
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name), np.int64).tobytes())
        return digest.hexdigest()[:16]


def settings_of(
    spec: SampleSpec,
    data: DataConfig,
    files: Sequence[Rows],
    ranges: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """All that decides how much a sample takes and which samples there are, in plain JSON types.

    Labels and augmentation are not among it, since they change no length. Files count by their
    content, so they may lie elsewhere than when the bins were made.
    """
    if data.captions or data.held_out:
        raise ConfigError(
            "config.data.bins packs the rows of whole files: leave it empty with "
            "config.data.captions or config.data.held_out"
        )
    settings: dict[str, Any] = {
        "row": list(spec.room),
        "data.pack": data.pack,
        "data.template": data.template,
        "data.turns": data.turns,
        "tokenizer": spec.tokenizer.fingerprint,
        "model.vision": [spec.vision.image_size, spec.vision.patch_size],
        "number of files in data.train": len(files),
    }
    for i, (source, file, (start, stop)) in enumerate(zip(data.train, files, ranges, strict=True)):
        with file.path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        known = {
            "size": file.path.stat().st_size,
            "rows": len(file),
            "sha256": content,
            "start": start,
            "stop": stop,
            "weight": source.weight,
        }
        settings |= {f"data.train[{i}].{name}": value for name, value in known.items()}
    for name, value in dataclasses.asdict(spec.image).items():
        if name not in ("image_mean", "image_std"):  # colors change no length either
            settings[f"model.image.{name}"] = value
    settings |= extras_settings(spec.extras)
    return json.loads(json.dumps(settings))


def extras_settings(extras: Extras) -> dict[str, int]:
    """What a strategy adds to pictures, as settings; nothing for one that adds nothing."""
    added = dataclasses.asdict(extras).items()
    return {f"{name} that config.fusion adds": value for name, value in added if value}


def save(path: str | Path, bins: Bins, notes: Mapping[str, Any]) -> None:
    """Writes a bins file, complete or not at all; `notes` are for people. OSError if it cannot."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"settings": dict(bins.settings), "notes": dict(notes)}
    try:
        with unfinished.open("wb") as file:
            np.savez(
                file,
                metadata=np.array(json.dumps(metadata)),
                bin_offsets=bins.bin_offsets.astype(np.int64),
                source=bins.source.astype(np.int16),
                row=bins.row.astype(np.int32),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | Path) -> Bins:
    """Reads a bins file; ConfigError if there is none, DataError if it is damaged."""
    if not Path(path).is_file():
        raise ConfigError(f"data.bins = {path} does not exist; make it with `{COMMAND}`")
    try:
        with np.load(path, allow_pickle=False) as file:
            offsets, source, row = (file[name] for name in _ARRAYS)
            settings = json.loads(str(file["metadata"]))["settings"]
        steps = np.diff(offsets)
        if not len(steps) or offsets[0] != 0 or offsets[-1] != len(row) or (steps < 1).any():
            raise ValueError("its offsets do not divide its samples")
        if len(source) != len(row) or (row < 0).any() or (source < 0).any():
            raise ValueError("its samples are no (source, row) pairs")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"data.bins = {path} is damaged ({error}); make it again") from error
    return Bins(offsets, source, row, settings)


def load_for(data: DataConfig, settings: Mapping[str, Any]) -> Bins:
    """The bins `data.bins`; ConfigError, naming what differs, unless made for `settings`."""
    bins = load(data.bins)
    different = [
        f"{name} was {bins.settings.get(name)!r} and is {settings.get(name)!r}"
        for name in dict.fromkeys([*settings, *bins.settings])
        if bins.settings.get(name) != settings.get(name)
    ]
    if different:
        raise ConfigError(
            f"data.bins = {data.bins} was made for other data or settings: "
            f"{'; '.join(different)}. Make it again with `{COMMAND}` or restore the old values"
        )
    return bins
