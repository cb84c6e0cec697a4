"""The rows of a file that are trained on, and those of the scenes that are held out.

A scene is what several pictures may show (`data.scene`): NLVR has six arrangements of the same
three boxes, and the strips of a meter repeat its photographs. It is held out whole or not at all,
or what is measured on it would measure memory. Pretraining, probes and comparisons hold out the
same ones where their `data.held_out` and `data.scene` are the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cli_jax.data.captions import caption_row
from cli_jax.experiment import ConfigError, DataConfig

if TYPE_CHECKING:
    from cli_jax.data.sources import Rows

PartOf = Literal["train", "held_out"]


class Part:
    """Some rows of a file, captioned if asked."""

    def __init__(self, file: Rows, indices: np.ndarray, data: DataConfig) -> None:
        self.path: Path = file.path
        self._file, self._indices, self._captions = file, indices, data.captions

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row `index` of the part; ConversationError if no caption can be made of it."""
        row = self._file[int(self._indices[index])]
        return caption_row(row, self._captions) if self._captions else row


def parts(
    files: Sequence[Rows], ranges: Sequence[tuple[int, int]], data: DataConfig, part: PartOf
) -> Iterator[Part]:
    """The part of every file. A scene that one file holds out is held out of all of them.

    Raises ConfigError if nothing of a file is left.
    """
    indices = [np.arange(*rows) for rows in ranges]
    if data.held_out or part == "held_out":
        scenes = [
            [scene_of(_row(file, i), data.scene) for i in range(*rows)]
            for file, rows in zip(files, ranges, strict=True)
        ]
        held_out = set().union(*(held_out_scenes(each, data.held_out) for each in scenes))
        for i, own in enumerate(scenes):
            indices[i] = indices[i][[(each in held_out) == (part == "held_out") for each in own]]
    for file, at in zip(files, indices, strict=True):
        if not len(at):
            raise ConfigError(
                f"config.data.held_out={data.held_out} leaves no row of {file.path} to "
                f"{'train on' if part == 'train' else 'measure on'}"
            )
        yield Part(file, at, data)


def scene_of(row: Mapping[str, Any], pattern: str) -> str:
    """A row's id without what the regular expression `pattern` finds in it.

    Without a pattern every picture is a scene of its own.
    """
    row_id = str(row.get("id", ""))
    try:
        return re.sub(pattern, "", row_id) if pattern else str(row.get("image") or row_id)
    except re.error as error:
        raise ConfigError(
            f"config.data.scene={pattern!r} is not a regular expression: {error}"
        ) from None


def held_out_scenes(scenes: Iterable[str], share: float) -> set[str]:
    """A share of the distinct scenes, at least one: the first ones in their order."""
    if not 0 < share < 1:
        raise ConfigError(f"config.data.held_out={share} is not a share between 0 and 1")
    ranked = in_order(scenes)
    return set(ranked[: max(1, round(share * len(ranked)))])


def in_order(scenes: Iterable[str]) -> list[str]:
    """The distinct scenes by a hash of their names.

    The same for every seed and every order of the rows, so that all encoders of a data set are
    measured on the same pictures.
    """
    return sorted(set(scenes), key=lambda name: hashlib.sha256(name.encode()).digest())


def _row(file: Rows, index: int) -> Mapping[str, Any]:
    """A row with an id; one without, or that cannot be read, is a scene of its own."""
    unknown = {"id": f"row {index}"}
    try:
        return {**unknown, **file[index]}
    except ValueError:
        return unknown
