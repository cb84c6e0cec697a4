"""The quick start's data: the same every time, without leaks, with right answers."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cli_jax.demo import digits

TRAIN, TEST = 60, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits.make(folder, TRAIN, TEST)
    return folder


def load(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def questions(rows):
    """(row, question, answer) of every turn of some rows."""
    for row in rows:
        turns = row["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            yield row, human["value"].removeprefix("<image>\n"), gpt["value"]


def answer(grid, question):
    """The answer read off a grid of digits, independently of the code that asked."""
    if match := re.fullmatch(r"How many (\d)s are there\?", question):
        return str(sum(digit == int(match[1]) for row in grid for digit in row))
    place = re.fullmatch(r"What is the digit at the ([a-z ]+)\?", question)[1].split()
    row = {"top": 0, "bottom": len(grid) - 1}
    column = {"left": 0, "right": len(grid[0]) - 1}
    rows = [row[word] for word in place if word in row]
    columns = [column[word] for word in place if word in column]
    assert len(rows) == (len(grid) > 1)
    assert len(columns) == (len(grid[0]) > 1)
    assert len(place) == len(rows) + len(columns)
    return str(grid[sum(rows)][sum(columns)])


def test_the_same_files_every_time(made, tmp_path):
    digits.make(tmp_path, TRAIN, TEST)

    def content(folder):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    assert content(tmp_path) == content(made)
    assert len(content(made)) == TRAIN + TEST + 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_composition(made, split):
    record = load(made, "composition")
    checked = 0
    for row, question, given in questions(load(made, split)):
        grid = record["-".join(row["id"].split("-")[:2])]["digits"]
        assert given == answer(grid, question), (row["id"], question)
        checked += 1
    assert checked >= 2 * TEST


def test_splits_share_no_handwritten_digit(made):
    record, used = load(made, "composition"), {"train": set(), "test": set()}
    for key, picture in record.items():
        used[key.split("-")[0]] |= {s for row in picture["sources"] for s in row}
    assert len(used["train"]) > 100
    assert len(used["test"]) > 80
    assert not used["train"] & used["test"]


def test_source_split():
    sources = digits.load_sources()
    assert len({image.tobytes() for image in sources.images}) == len(sources.images) == 1797
    train, test = digits.split(sources)
    assert sorted([*train.indices, *test.indices]) == list(range(1797))
    share = np.bincount(test.labels) / np.bincount(sources.labels)
    np.testing.assert_allclose(share, digits.TEST_SHARE, atol=0.01)
    for part in (train, test):
        np.testing.assert_array_equal(part.labels, sources.labels[part.indices])
        np.testing.assert_array_equal(part.images, sources.images[part.indices])


def test_pictures_show_what_is_recorded():
    """With sources of one gray value per handwritten digit, every cell tells its source."""
    indices = np.arange(40)
    sources = digits.Sources(
        np.broadcast_to((100 + 3 * indices).astype(np.uint8)[:, None, None], (40, 8, 8)),
        indices % 10,
        1000 + indices,
    )
    rng = np.random.default_rng(0)
    shapes = Counter()
    for _ in range(100):
        picture = digits.compose(sources, rng)
        shapes[picture.digits.shape] += 1
        assert picture.pixels.shape == tuple(digits.CELL * n for n in picture.digits.shape)
        for (row, column), digit in np.ndenumerate(picture.digits):
            cell = picture.pixels[row * digits.CELL :, column * digits.CELL :]
            value = cell[: digits.CELL, : digits.CELL].max()
            source = picture.sources[row, column]
            assert value == 100 + 3 * (source - 1000)
            assert digit == source % 10
    assert set(shapes) == set(digits.GRIDS)


def test_rows_are_llava_rows(made):
    record = load(made, "composition")
    for row in load(made, "train"):
        grid = np.array(record[row["id"]]["digits"])
        assert len(row["conversations"]) == 2 * (grid.size + digits.COUNT_QUESTIONS)
        values = [turn["value"] for turn in row["conversations"]]
        assert values[0].startswith("<image>\n")
        assert "<image>" not in "".join(values[1:])
        with Image.open(made / row["image"]) as image:
            assert image.size == (grid.shape[1] * digits.CELL, grid.shape[0] * digits.CELL)
    test = load(made, "test")
    assert Counter(row["category"] for row in test) == {"where": TEST, "count": TEST}
    assert all(len(row["conversations"]) == 2 for row in test)
    assert len({row["id"] for row in test}) == len(test)


def test_answers_cannot_be_guessed(tmp_path):
    """What always giving a question's commonest training answer reaches on the test split."""
    digits.make(tmp_path, 1500, 300)
    seen = Counter((q, a) for _, q, a in questions(load(tmp_path, "train")))
    best = {q: max((n, a) for (p, a), n in seen.items() if p == q)[1] for q, _ in seen}
    right, total = Counter(), Counter()
    for row, question, given in questions(load(tmp_path, "test")):
        total[row["category"]] += 1
        right[row["category"]] += best[question] == given
    chance = {name: right[name] / total[name] for name in total}
    assert chance["where"] < 0.16
    assert chance["count"] < 0.42
