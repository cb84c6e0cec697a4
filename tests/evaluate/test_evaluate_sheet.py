import itertools

import numpy as np
import pytest
from PIL import Image

from cli_jax.evaluate.sheet import (
    GREEN,
    RED,
    WIDTH,
    Example,
    contact_sheet,
    spread,
)

CELL_HEIGHT = 122 + 5 * 15 + 4 * 8  # picture of 2 : 1 fitted to 244 pixels, five lines, margins


def example(correct=True, images=1, text="How many?"):
    pictures = [Image.new("RGB", (40, 20), (200, 10 * i, 250)) for i in range(images)]
    return Example(pictures, text, "3", "3" if correct else "4", correct)


def has_color(pixels, color):
    return bool((np.abs(pixels.astype(int) - color).sum(axis=-1) < 20).any())


def test_the_sheet_has_a_cell_per_example(tmp_path):
    path = tmp_path / "examples.png"
    contact_sheet([example() for _ in range(8)], path)
    with Image.open(path) as sheet:
        assert (sheet.size, sheet.format) == ((6 * WIDTH, 2 * CELL_HEIGHT), "PNG")


def test_right_is_green_and_wrong_is_red_in_the_cell_of_its_example(tmp_path):
    path = tmp_path / "examples.png"
    contact_sheet([example(correct=True), example(correct=False)], path)
    pixels = np.asarray(Image.open(path))
    left, right = pixels[:, :WIDTH], pixels[:, WIDTH:]
    assert has_color(left, GREEN)
    assert not has_color(left, RED)
    assert has_color(right, RED)
    assert not has_color(right, GREEN)


def test_examples_fill_the_sheet_row_by_row(tmp_path):
    path = tmp_path / "examples.png"
    contact_sheet([example(correct=i != 6) for i in range(7)], path)
    pixels = np.asarray(Image.open(path))
    assert has_color(pixels[CELL_HEIGHT:, :WIDTH], RED)
    assert not has_color(pixels[:CELL_HEIGHT], RED)
    assert (pixels[CELL_HEIGHT:, WIDTH:] == 255).all()


def test_every_picture_of_a_row_is_drawn(tmp_path):
    path = tmp_path / "examples.png"
    contact_sheet([example(images=3)], path)
    pixels = np.asarray(Image.open(path))
    assert all(has_color(pixels, (200, 10 * i, 250)) for i in range(3))


@pytest.mark.parametrize("text", ["", "word " * 200, "x" * 2000, "日本語 ü\n\nlines"])
def test_no_text_is_too_much(tmp_path, text):
    path = tmp_path / "examples.png"
    contact_sheet([example(text=text), example(images=0, text=text)], path)
    assert Image.open(path).size == (2 * WIDTH, CELL_HEIGHT)


@pytest.mark.parametrize("size", [(1, 500), (4000, 1), (1, 1)])
def test_any_picture_shape_fits(tmp_path, size):
    odd = Example([Image.new("RGB", size, (0, 0, 255))], "q", "a", "b", False)
    contact_sheet([odd], tmp_path / "examples.png")
    width, height = Image.open(tmp_path / "examples.png").size
    assert width == WIDTH
    assert height <= 150 + 5 * 15 + 4 * 8


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "examples.png")


@pytest.mark.parametrize(("count", "wanted"), [(2160, 24), (24, 24), (5, 24), (1, 24), (0, 24)])
def test_spread_is_even_and_in_range(count, wanted):
    picked = spread(count, wanted)
    assert len(picked) == min(count, wanted)
    assert len(set(picked)) == len(picked)
    assert picked == sorted(picked)
    assert all(0 <= i < count for i in picked)
    if count > 1000:
        assert len({b - a for a, b in itertools.pairwise(picked)}) <= 2
