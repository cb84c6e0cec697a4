"""Which pictures are trained on, held out and asked about: cut once, checked, written to files.

The pictures of all training files are put in one order by a seed. The first ones are held out, and
a data fraction x takes the first x of the rest, so that smaller fractions lie within larger ones.
No jax here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.compare.config import Comparison
from cli_jax.data.sources import RowError, open_sources
from cli_jax.evaluate.prompts import read_questions
from cli_jax.experiment import ConfigError, SourceConfig
from cli_jax.text.conversation import ConversationError, exchanges

FOLDER = "splits"
HELD_OUT = "held_out"  # the held-out pictures' place among the evaluation files
HELD_OUT_FILE = f"{HELD_OUT}.jsonl"
Row = dict[str, Any]


def train_name(fraction: float, file: int) -> str:
    """The part of a training file that belongs to a data fraction."""
    return f"train_{fraction:g}_{file}.jsonl"


def noted_name(name: str) -> str:
    """What is noted of an evaluation file's questions."""
    return f"{name}_pictures.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Unit:
    """Rows that no split separates: those of one picture, or of pictures that stay together."""

    rows: list[tuple[int, Row]]  # with the number of their training file
    pictures: set[str]


@dataclasses.dataclass(frozen=True)
class Noted:
    """The pictures and the category of every question of a file, so that reports need no data.

    Pictures that `together` matches in the same text are one to the bootstrap.
    """

    pictures: list[list[str]]
    categories: list[str]
    together: re.Pattern[str] | None

    def all(self) -> set[str]:
        return {picture for each in self.pictures for picture in each}

    def names(self) -> list[str]:
        """What each question is about: the same name for the same pictures, or variants of them."""
        names = []
        for i, each in enumerate(self.pictures):
            found = self.together.search(each[0]) if self.together and each else None
            names.append(found[0] if found else " ".join(each) or f"question {i}")
        return names

    def text(self) -> str:
        return json.dumps({"pictures": self.names(), "categories": self.categories})

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
    rows, unreadable = _read(comparison)
    together = _compiled(settings.held_out.together)
    units = _units(rows, [root_of(source) for source in data.train], together)
    order = np.random.default_rng(settings.split_seed).permutation(len(units))
    held = round(settings.held_out.share * len(units))
    held_out, rest = ([units[i] for i in part] for part in (order[:held], order[held:]))
    if not rest or (settings.held_out.share and not held_out):
        raise ConfigError(
            f"config.compare.held_out.share={settings.held_out.share} of {len(units)} pictures "
            "leaves nothing to train on, or holds nothing out"
        )
    if shared := pictures_in(held_out) & pictures_in(rest):
        raise ConfigError(f"{min(shared)} would be held out in one row and trained on in another")
    report: dict[str, Any] = {"unreadable_rows": unreadable, "train": {}, "evals": {}}
    files: dict[str, str] = {}
    for fraction in settings.fractions:
        part = rest[: max(1, round(fraction * len(rest)))]
        texts = {
            train_name(fraction, i): _lines(row for unit in part for n, row in unit.rows if n == i)
            for i in range(len(data.train))
        }
        if not all(texts.values()):
            raise ConfigError(f"config.compare.fractions: {fraction} leaves a training file empty")
        report["train"][f"{fraction:g}"] = {
            "pictures": len(pictures_in(part)),
            "rows": sum(len(unit.rows) for unit in part),
            "sha256": [sha256(text.encode()) for text in texts.values()],
        }
        files |= texts
    if held_out:
        asked = list(_held_out_questions(comparison, held_out))
        files[HELD_OUT_FILE] = _lines(asked)
        noted = Noted(
            [_pictures(row, "/") for row in asked], [row["category"] for row in asked], together
        )
        files[noted_name(HELD_OUT)] = noted.text()
        report["evals"][HELD_OUT] = noted.report() | {"sha256": sha256(_lines(asked).encode())}
    seen = pictures_in(units)
    for name, each in comparison.eval_files.items():
        root = each.image_root or str(Path(each.path).parent)
        questions = read_questions(each.path)
        noted = Noted(
            [_pictures({"image": list(question.images)}, root) for question in questions],
            [question.category for question in questions],
            together,
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
            partial = path.with_name(f"{name}.partial")
            partial.write_text(text)
            partial.replace(path)


def train_sources(
    comparison: Comparison, folder: Path, fraction: float
) -> tuple[SourceConfig, ...]:
    """`data.train` of the runs on a fraction: the parts of the base's files, weights kept."""
    sources = comparison.base.data.train
    return tuple(
        SourceConfig(str(folder / FOLDER / train_name(fraction, i)), root_of(each), each.weight)
        for i, each in enumerate(sources)
    )


def eval_file(comparison: Comparison, folder: Path, name: str) -> tuple[str, str]:
    """(path, image root) of an evaluation file, or of the held-out questions."""
    if name == HELD_OUT:
        return str(folder / FOLDER / HELD_OUT_FILE), "/"
    each = comparison.eval_files[name]
    return each.path, each.image_root


def pictures_of(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """(picture, category) of every question of an evaluation file, in its order."""
    noted = json.loads((folder / FOLDER / noted_name(name)).read_text())
    return noted["pictures"], noted["categories"]


def root_of(source: SourceConfig) -> str:
    return source.image_root or str(Path(source.path).parent)


def pictures_in(units: Iterable[Unit]) -> set[str]:
    return set().union(*(unit.pictures for unit in units))


def _read(comparison: Comparison) -> tuple[list[tuple[int, Row]], int]:
    """All rows with the number of their file, and how many could not be read."""
    files, ranges, _ = open_sources(comparison.base.data)
    rows, unreadable = [], 0
    for number, (file, (start, stop)) in enumerate(zip(files, ranges, strict=True)):
        for index in range(start, stop):
            try:
                rows.append((number, dict(file[index])))
            except RowError:
                unreadable += 1
    return rows, unreadable


def _compiled(together: str) -> re.Pattern[str] | None:
    try:
        return re.compile(together) if together else None
    except re.error as error:
        raise ConfigError(f"config.compare.held_out.together: {together!r}: {error}") from None


def _units(
    rows: list[tuple[int, Row]], roots: list[str], together: re.Pattern[str] | None
) -> list[Unit]:
    found: dict[tuple[str, ...], Unit] = {}
    for place, (number, row) in enumerate(rows):
        pictures = _pictures(row, roots[number])
        key = tuple(pictures) or (str(place),)
        if together and pictures:
            matched = together.search(pictures[0])
            if not matched:
                raise ConfigError(
                    f"config.compare.held_out.together={together.pattern!r} does not match "
                    f"{pictures[0]}"
                )
            key = (matched[0],)
        unit = found.setdefault(key, Unit([], set()))
        unit.rows.append((number, row))
        unit.pictures.update(pictures)
    return list(found.values())


def _pictures(row: Mapping[str, Any], root: str) -> list[str]:
    image = row.get("image")
    paths = image if isinstance(image, list) else [image]
    found = [path for path in paths if path and isinstance(path, str)]
    return [os.path.realpath(os.path.join(root, path)) for path in found]


def _held_out_questions(comparison: Comparison, units: list[Unit]) -> Iterable[Row]:
    """Every question of the held-out rows, or some of each, as a row; pictures below /."""
    held_out, sources = comparison.settings.held_out, comparison.base.data.train
    rng = np.random.default_rng([comparison.settings.split_seed, 1])
    for unit in units:
        for number, row in unit.rows:
            pictures = _pictures(row, root_of(sources[number]))
            try:
                found = exchanges(row.get("conversations"), len(pictures))
            except ConversationError:
                continue
            wanted = min(held_out.questions or len(found), len(found))
            chosen = sorted(rng.choice(len(found), wanted, replace=False))
            paths = [os.path.relpath(picture, "/") for picture in pictures]
            image = {"image": paths if len(paths) > 1 else paths[0]} if paths else {}
            for i in chosen:
                yield {
                    "id": f"{row.get('id', '')}#{i}",
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
