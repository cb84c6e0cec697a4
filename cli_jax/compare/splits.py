"""Which pictures are trained on, held out and asked about: cut once, checked, written to files.

Scenes are held out as everywhere else (cli_jax/data/parts.py), and a data fraction x takes the
first x of the rest in their order, so that smaller fractions lie within larger ones. No jax here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.compare.config import HELD_OUT, Comparison
from cli_jax.data.parts import PartOf, in_order, scene_of
from cli_jax.data.sources import RowError, image_root_of, open_sources
from cli_jax.evaluate.prompts import read_questions
from cli_jax.experiment import ConfigError, SourceConfig
from cli_jax.output import read_json, write_file
from cli_jax.text.conversation import ConversationError, exchanges

FOLDER = "splits"
HELD_OUT_FILE = f"{HELD_OUT}.jsonl"
Row = dict[str, Any]


def train_name(fraction: float, file: int) -> str:
    """The part of a training file that belongs to a data fraction."""
    return f"train_{fraction:g}_{file}.jsonl"


def noted_name(name: str) -> str:
    """What is noted of an evaluation file's questions."""
    return f"{name}_scenes.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scene:
    """Rows that no split separates."""

    rows: list[tuple[int, Row]]  # with the number of their training file
    pictures: set[str]


@dataclasses.dataclass(frozen=True)
class Noted:
    """The pictures, the scene and the category of every question of a file, so that reports need
    no data."""

    pictures: list[list[str]]
    scenes: list[str]
    categories: list[str]

    def all(self) -> set[str]:
        return {picture for each in self.pictures for picture in each}

    def text(self) -> str:
        return json.dumps({"scenes": self.scenes, "categories": self.categories})

    def report(self) -> dict[str, Any]:
        return {
            "questions": len(self.pictures),
            "pictures": len(self.all()),
            "categories": sorted(set(self.categories)),
        }


@dataclasses.dataclass(frozen=True)
class Splits:
    """What a comparison's splits hold, with checksums, and their files by name, not yet written."""

    report: dict[str, Any]
    files: dict[str, str]


def cut(comparison: Comparison) -> Splits:
    """All splits; the same config and data give the same bytes.

    Raises ConfigError if a picture is in two splits, or if one of them would be empty.
    """
    settings, data = comparison.settings, comparison.base.data
    rest, unreadable = _read(comparison, "train")
    held_out, unreadable_too = _read(comparison, "held_out") if data.held_out else ([], 0)
    if shared := pictures_in(held_out) & pictures_in(rest):
        raise ConfigError(
            f"{min(shared)} would be held out in one row and trained on in another: "
            f"config.data.scene={data.scene!r} takes them for different scenes"
        )
    report: dict[str, Any] = {"unreadable_rows": unreadable + unreadable_too}
    report |= {"train": {}, "evals": {}}
    files: dict[str, str] = {}
    for fraction in settings.fractions:
        part = rest[: max(1, round(fraction * len(rest)))]
        texts = {
            train_name(fraction, i): _lines(
                row for scene in part for n, row in scene.rows if n == i
            )
            for i in range(len(data.train))
        }
        if not all(texts.values()):
            raise ConfigError(f"config.compare.fractions: {fraction} leaves a training file empty")
        report["train"][f"{fraction:g}"] = {
            "pictures": len(pictures_in(part)),
            "rows": sum(len(scene.rows) for scene in part),
            "sha256": [sha256(text.encode()) for text in texts.values()],
        }
        files |= texts
    if held_out:
        asked = list(_held_out_questions(comparison, held_out))
        noted = Noted(
            [_pictures(row, "/") for row in asked],
            [row.pop("scene") for row in asked],
            [row["category"] for row in asked],
        )
        files[HELD_OUT_FILE], files[noted_name(HELD_OUT)] = _lines(asked), noted.text()
        report["evals"][HELD_OUT] = noted.report() | {"sha256": sha256(_lines(asked).encode())}
    seen = pictures_in(rest) | pictures_in(held_out)
    for name, each in comparison.eval_files.items():
        root = image_root_of(each.path, each.image_root)
        questions = read_questions(each.path)
        noted = Noted(
            [_pictures({"image": list(question.images)}, root) for question in questions],
            [scene_of({"id": question.id, **question.row}, data.scene) for question in questions],
            [question.category for question in questions],
        )
        if shared := seen & noted.all():
            raise ConfigError(
                f"{min(shared)} is in the training data and in {each.path}: a comparison needs "
                "pictures that no arm has seen"
            )
        _check_categories(comparison, name, noted)
        files[noted_name(name)] = noted.text()
        report["evals"][name] = noted.report() | {"sha256": sha256(Path(each.path).read_bytes())}
    return Splits(report, files)


def write(splits: Splits, folder: Path) -> None:
    """Writes the splits into `folder`/splits; what is there already stays."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, text in splits.files.items():
        path = folder / FOLDER / name
        if not path.is_file() or path.read_text() != text:
            write_file(path, text)


def train_sources(
    comparison: Comparison, folder: Path, fraction: float
) -> tuple[SourceConfig, ...]:
    """`data.train` of the runs on a fraction: the parts of the base's files, weights kept."""
    sources = comparison.base.data.train
    return tuple(
        SourceConfig(
            str(folder / FOLDER / train_name(fraction, i)),
            image_root_of(each.path, each.image_root),
            each.weight,
        )
        for i, each in enumerate(sources)
    )


def eval_file(comparison: Comparison, folder: Path, name: str) -> tuple[str, str]:
    """(path, image root) of an evaluation file, or of the held-out questions."""
    if name == HELD_OUT:
        return str(folder / FOLDER / HELD_OUT_FILE), "/"
    each = comparison.eval_files[name]
    return each.path, each.image_root


def scenes_of(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """(scene, category) of every question of an evaluation file, in its order."""
    noted = read_json(folder / FOLDER / noted_name(name))
    return noted["scenes"], noted["categories"]


def pictures_in(scenes: Iterable[Scene]) -> set[str]:
    return set().union(*(scene.pictures for scene in scenes))


def _read(comparison: Comparison, part: PartOf) -> tuple[list[Scene], int]:
    """The scenes of a part in their order, and how many of its rows could not be read."""
    found: dict[str, Scene] = {}
    files, ranges, roots = open_sources(comparison.base.data, part)
    unreadable = 0
    for number, (file, (start, stop)) in enumerate(zip(files, ranges, strict=True)):
        for index in range(start, stop):
            try:
                row = dict(file[index])
            except RowError:
                unreadable += 1
                continue
            name = scene_of({"id": f"row {index}", **row}, comparison.base.data.scene)
            scene = found.setdefault(name, Scene([], set()))
            scene.rows.append((number, row))
            scene.pictures.update(_pictures(row, roots[number]))
    return [found[name] for name in in_order(found)], unreadable


def _pictures(row: Mapping[str, Any], root: str) -> list[str]:
    image = row.get("image")
    paths = image if isinstance(image, list) else [image]
    found = [path for path in paths if path and isinstance(path, str)]
    return [os.path.realpath(os.path.join(root, path)) for path in found]


def _held_out_questions(comparison: Comparison, scenes: list[Scene]) -> Iterable[Row]:
    """Every question of the held-out rows, or some of each, as a row with its `scene`; pictures
    below /."""
    data, most = comparison.base.data, comparison.settings.held_out_questions
    roots = [image_root_of(source.path, source.image_root) for source in data.train]
    rng = np.random.default_rng(0)
    for scene in scenes:
        for number, row in scene.rows:
            pictures = _pictures(row, roots[number])
            try:
                found = exchanges(row.get("conversations"), len(pictures))
            except ConversationError:
                continue
            wanted = min(most or len(found), len(found))
            chosen = sorted(rng.choice(len(found), wanted, replace=False))
            paths = [os.path.relpath(picture, "/") for picture in pictures]
            image = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
            for i in chosen:
                yield {
                    "id": f"{row.get('id', '')}#{i}",
                    "scene": scene_of(row, data.scene),
                    "category": str(row.get("category", "all")),
                    "conversations": found[i],
                    **image,
                }


def _check_categories(comparison: Comparison, file: str, noted: Noted) -> None:
    for each in comparison.settings.evals:
        unknown = set(each.categories) - set(noted.categories)
        if unknown and comparison.file_of(each) == file:
            raise ConfigError(
                f"config.compare.evals: {each.path} has no category {min(unknown)!r}; it has "
                f"{sorted(set(noted.categories))}"
            )


def _lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
