"""Pictures of several handwritten digits, with questions that need detail: the quick start's data.

The digits are scikit-learn's bundled set: 1,797 real handwritten digits of 8 x 8 pixels (UCI
"Optical Recognition of Handwritten Digits"), so nothing is downloaded. A picture shows some of them
in a grid of rows and columns, each enlarged and moved a little. `where` asks which digit stands at
a place of the grid, `count` how often one digit occurs. Source digits are split before anything is
composed: no handwritten digit of a training picture is in a test picture.

Nothing is random but by seed: the same files come out every time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cli_jax.experiment import ConfigError

CELL = 32  # pixels along a side of a grid cell
SIZES = (22, 31)  # a digit's side in pixels, drawn from this range
GRIDS = ((1, 2), (2, 1), (2, 2))  # rows, columns of a picture
TRAIN_PICTURES = 4000
TEST_PICTURES = 300
COUNT_QUESTIONS = 2  # of a training picture, beside one `where` question per cell
TEST_SHARE = 0.25  # of the source digits
SEED = 0

_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "center", "right")}


@dataclasses.dataclass(frozen=True, eq=False)
class Sources:
    """Handwritten digits: images uint8 [n, 8, 8], labels int [n], their indices in the set [n]."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def __getitem__(self, at: np.ndarray) -> Sources:
        return Sources(self.images[at], self.labels[at], self.indices[at])


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A composed picture uint8 [height, width] and what is in it, by row and column."""

    pixels: np.ndarray
    digits: np.ndarray  # the answer key
    sources: np.ndarray  # index of the handwritten digit in scikit-learn's set


@dataclasses.dataclass(frozen=True)
class Question:
    category: str  # `where` or `count`
    text: str
    answer: str


def make(
    folder: str | Path, train_pictures: int = TRAIN_PICTURES, test_pictures: int = TEST_PICTURES
) -> None:
    """Writes train.json, test.json, composition.json and images/ into `folder`, which must exist.

    train.json has one row per picture with all its questions as turns, test.json one row per
    question with its `category`; composition.json says of every picture which digits it shows and
    which handwritten sources they are.
    """
    folder = Path(folder)
    train, test = split(load_sources())
    rng = np.random.default_rng(SEED)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    record = {}
    for name, sources, pictures in (
        ("train", train, train_pictures),
        ("test", test, test_pictures),
    ):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(pictures):
            picture = compose(sources, rng)
            key, path = f"{name}-{i:05d}", f"images/{name}/{i:05d}.png"
            Image.fromarray(picture.pixels).save(folder / path, compress_level=1)
            record[key] = {"digits": picture.digits.tolist(), "sources": picture.sources.tolist()}
            if name == "train":
                rows[name].append(_row(key, path, _train_questions(picture, rng)))
            else:
                for question in _test_questions(picture, rng):
                    row = _row(f"{key}-{question.category}", path, [question])
                    rows[name].append({**row, "category": question.category})
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "composition.json").write_text(json.dumps(record))


def load_sources() -> Sources:
    """The bundled set; ConfigError if scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "config.data.prepare = 'digits' needs scikit-learn: pip install 'cli-jax[demo]'"
        ) from error
    bundled = load_digits()
    images = np.round(bundled.images * (255 / 16)).astype(np.uint8)
    return Sources(images, bundled.target.astype(np.int64), np.arange(len(images)))


def split(sources: Sources) -> tuple[Sources, Sources]:
    """Training and test sources, disjoint, with the same share of every digit in both."""
    order = np.random.default_rng(SEED).permutation(len(sources.labels))
    test = np.zeros(len(order), bool)
    for digit in range(10):
        own = order[sources.labels[order] == digit]
        test[own[: round(TEST_SHARE * len(own))]] = True
    return sources[np.flatnonzero(~test)], sources[np.flatnonzero(test)]


def compose(sources: Sources, rng: np.random.Generator) -> Picture:
    """A picture of one of the `GRIDS`; one digit occurs several times, the others at most once."""
    rows, columns = GRIDS[rng.integers(len(GRIDS))]
    cells = rows * columns
    kinds = rng.permutation(10)
    repeated = rng.integers(1, cells + 1)
    digits = rng.permutation(np.concatenate([np.repeat(kinds[0], repeated), kinds[1:]])[:cells])
    digits = digits.reshape(rows, columns)
    pixels = np.zeros((rows * CELL, columns * CELL), np.uint8)
    chosen = np.zeros_like(digits)
    for (row, column), digit in np.ndenumerate(digits):
        at = rng.choice(np.flatnonzero(sources.labels == digit))
        chosen[row, column] = sources.indices[at]
        size = int(rng.integers(*SIZES))
        y, x = np.array([row, column]) * CELL + rng.integers(0, CELL - size + 1, 2)
        enlarged = Image.fromarray(sources.images[at]).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        pixels[y : y + size, x : x + size] = np.asarray(enlarged)
    return Picture(pixels, digits, chosen)


def where(digits: np.ndarray, row: int, column: int) -> Question:
    """Which digit stands at (row, column) of `digits` [rows, columns]."""
    words = _ROWS[digits.shape[0]][row], _COLUMNS[digits.shape[1]][column]
    place = " ".join(word for word in words if word)
    return Question("where", f"What is the digit at the {place}?", str(digits[row, column]))


def count(digits: np.ndarray, digit: int) -> Question:
    """How often `digit` occurs in `digits` [rows, columns]."""
    return Question("count", f"How many {digit}s are there?", str(np.sum(digits == digit)))


def _train_questions(picture: Picture, rng: np.random.Generator) -> list[Question]:
    """Every place and `COUNT_QUESTIONS` digits, in random order."""
    questions = [where(picture.digits, *at) for at in np.ndindex(picture.digits.shape)]
    questions += [_any_count(picture.digits, rng) for _ in range(COUNT_QUESTIONS)]
    return [questions[i] for i in rng.permutation(len(questions))]


def _test_questions(picture: Picture, rng: np.random.Generator) -> list[Question]:
    """One question of each category."""
    row, column = (int(rng.integers(n)) for n in picture.digits.shape)
    return [where(picture.digits, row, column), _any_count(picture.digits, rng)]


def _any_count(digits: np.ndarray, rng: np.random.Generator) -> Question:
    """A digit that occurs, or does not; answer 0 half as likely as each other that is possible."""
    counts = np.bincount(digits.ravel(), minlength=10)
    answers = np.unique(counts)
    odds = np.where(answers == 0, 1, 2)
    answer = rng.choice(answers, p=odds / odds.sum())
    return count(digits, int(rng.choice(np.flatnonzero(counts == answer))))


def _row(key: str, path: str, questions: list[Question]) -> dict[str, Any]:
    turns = []
    for i, question in enumerate(questions):
        slot = "" if i else "<image>\n"
        turns.append({"from": "human", "value": slot + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": key, "image": path, "data_source": "digits", "conversations": turns}
