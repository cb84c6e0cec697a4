"""Augmentation: bounded, deterministic, and nothing at strength 0."""

import numpy as np
import pytest
from PIL import Image

from cli_jax.data.augment import Augmentation, augment

STRONG = Augmentation(strength=1.0, jitter=1.0)


@pytest.fixture
def image():
    pixels = np.full((40, 60, 3), 60, np.uint8)
    pixels[10:30, 20:40] = (200, 120, 40)
    return Image.fromarray(pixels)


def test_strength_zero_changes_nothing(image):
    got = augment(image, np.random.default_rng(0), Augmentation())
    np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


def test_the_size_stays_and_the_generator_decides(image):
    a, b, c = (augment(image, np.random.default_rng(seed), STRONG) for seed in (1, 1, 2))
    assert a.size == image.size
    assert a.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert (np.asarray(a) != np.asarray(c)).any()


def test_the_shape_moves_by_little_and_is_never_mirrored(image):
    left_half = np.asarray(image).astype(float)
    left_half[:, 30:] = 60  # now only the left of the block is left: a mirrored copy would differ
    start = Image.fromarray(left_half.astype(np.uint8))
    shifts, areas = [], []
    for seed in range(40):
        pixels = np.asarray(augment(start, np.random.default_rng(seed), STRONG)).astype(float)
        orange = pixels[..., 0] - pixels[..., 2]  # the rest is gray
        block = orange > orange.max() / 2
        y, x = np.nonzero(block)
        shifts.append((x.mean() - 24.5, y.mean() - 19.5))
        areas.append(block.mean() * 2400 / 200)
    shifts, areas = np.abs(shifts), np.array(areas)
    assert shifts[:, 0].max() < 1.15 * 0.1 * 60 + 0.15 * 6 + 1
    assert shifts[:, 1].max() < 1.15 * 0.1 * 40 + 1
    assert shifts.max(0).min() > 1
    assert 0.6 < areas.min() < 0.95 < 1.05 < areas.max() < 1.5


def test_strength_scales_the_change(image):
    def change(strength):
        spec = Augmentation(strength, strength)
        changed = [augment(image, np.random.default_rng(s), spec) for s in range(10)]
        return np.mean([np.abs(np.asarray(c, float) - np.asarray(image)).mean() for c in changed])

    assert 0 < change(0.1) < change(0.5) < change(1.0)


def test_shape_and_color_have_strengths_of_their_own(image):
    start = np.asarray(image)
    shape, color = (
        np.asarray(augment(image, np.random.default_rng(0), Augmentation(*strengths)))
        for strengths in ((1.0, 0.0), (0.0, 1.0))
    )
    assert set(map(tuple, color.reshape(-1, 3))) != set(map(tuple, start.reshape(-1, 3)))
    edges = [np.abs(np.diff(x[..., 0].astype(int), axis=1)) > 30 for x in (start, shape, color)]
    np.testing.assert_array_equal(edges[0], edges[2])
    assert (edges[0] != edges[1]).any()
    assert np.abs(shape[15:25, 25:35].astype(int) - (200, 120, 40)).max() == 0


def test_zoom_is_about_the_center(image):
    class OnlyZoom:
        def uniform(self, low=0.0, high=1.0, size=None):
            return high if size is None else np.zeros(size)

    pixels = np.asarray(augment(image, OnlyZoom(), STRONG))
    y, x = np.nonzero(pixels[..., 0] > 130)
    assert x.mean() == pytest.approx(29.5, abs=0.6)  # the block's center is the picture's
    assert y.mean() == pytest.approx(19.5, abs=0.6)
    assert len(x) == pytest.approx(400 * 1.15**2, rel=0.1)


def test_an_augmentation_that_changes_nothing_is_false():
    assert not Augmentation()
    for field in ("strength", "jitter"):
        assert Augmentation(**{field: 0.1})
