"""The two-level paired bootstrap: small cases by hand, and coverage on synthetic data."""

import itertools

import numpy as np
import pytest

from cli_jax.compare.bootstrap import by_scene, interval, resample


def test_sums_by_scene():
    values = np.array([[1, 0, -1, 1], [0, 0, 1, 1]])
    sums, questions = by_scene(values, ["b", "a", "b", "b"])
    assert sums.tolist() == [[0, 1], [0, 2]]  # pictures a, b
    assert questions.tolist() == [1, 3]


def test_resampling_draws_with_replacement():
    counts = resample(np.random.default_rng(0), 4000, 3)
    assert counts.shape == (4000, 3)
    assert (counts.sum(axis=1) == 3).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.06)
    # Binomial(3, 1/3): a thing is left out in (2/3)^3 of the draws.
    np.testing.assert_allclose((counts == 0).mean(), 8 / 27, atol=0.02)


def test_every_draw_is_one_of_those_listed_by_hand():
    """2 seeds, 2 pictures with 1 and 2 questions: all 16 draws, written out."""
    values = np.array([[1.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    pictures = ["p", "q", "q"]
    means = []
    for seeds in itertools.product((0, 1), repeat=2):
        for drawn in itertools.product("pq", repeat=2):
            each = [
                values[s, i] for s in seeds for d in drawn for i, p in enumerate(pictures) if p == d
            ]
            means.append(np.mean(each))
    found = interval(values, pictures, draws=40_000)
    assert found.mean == pytest.approx(values.mean())
    # Of 16 equally likely draws the lowest mean has 1/16 > 2.5%, and so has the highest.
    assert (found.low, found.high) == (min(means), max(means))


def test_equal_arms_have_no_interval_and_one_seed_varies_by_scenes_only():
    assert interval(np.zeros((3, 5)), list("aabbc"), draws=50) == (0, 0, 0)
    same = interval(np.array([[1.0, 0.0]]), ["p", "p"], draws=500)
    assert same == (0.5, 0.5, 0.5)  # one picture, one seed: nothing to resample


def test_seeds_alone_widen_it():
    values = np.array([[1.0] * 50, [0.0] * 50])
    found = interval(values, [f"p{i}" for i in range(50)], draws=4000)
    assert found == (0.5, 0.0, 1.0)


def test_the_same_input_gives_the_same_interval_whatever_the_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    values, pictures = rng.integers(-1, 2, (3, 40)), [f"p{i // 4}" for i in range(40)]
    first = interval(values, pictures, draws=300)
    assert interval(values, pictures, draws=300) == first
    monkeypatch.setattr("cli_jax.compare.bootstrap._CHUNK", 7 * 10)
    other = interval(values, pictures, draws=300)
    np.testing.assert_allclose(other, first, atol=0.06)


def simulated(rng, seeds, pictures, each, effect):
    """Differences whose mean is `effect`: a part by seed, a part by picture, and noise."""
    by_seed = 0.05 * rng.normal(size=(seeds, 1, 1))
    by_picture = 0.3 * rng.normal(size=(1, pictures, 1))
    noise = 0.5 * rng.normal(size=(seeds, pictures, each))
    return (effect + by_seed + by_picture + noise).reshape(seeds, -1)


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng, hits, narrow = np.random.default_rng(2), 0, 0
    names = [f"p{i}" for i in range(40) for _ in range(5)]
    for _ in range(200):
        values = simulated(rng, 8, 40, 5, effect=0.1)
        _, low, high = interval(values, names, draws=300)
        hits += low <= 0.1 <= high
        # As if every question had a picture of its own, and there were one seed.
        _, low, high = interval(values.mean(axis=0)[None], [str(i) for i in range(200)], draws=300)
        narrow += low <= 0.1 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert narrow / 200 < 0.8  # resampling questions promises too much


@pytest.mark.parametrize("values", [np.zeros((1, 3)), np.zeros((0, 2)), np.zeros((2, 0))])
def test_shapes_must_fit(values):
    with pytest.raises(ValueError, match="for 2 questions' scenes"):
        interval(values, ["a", "b"])
