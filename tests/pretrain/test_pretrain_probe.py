"""Probes: what is planted is read out, what is not there is not, and every place is its own."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pretrain_small
import pytest
from PIL import Image

from cli_jax.analysis import regression
from cli_jax.analysis.places import (
    PlaceError,
    in_batches,
    patch_pixels,
    place_patches,
    principal_components,
    summarize,
)
from cli_jax.analysis.probe import Picture, ProbeError, read_pictures, read_tiles, score
from cli_jax.analysis.regression import PENALTIES, read_out
from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data.facts import Fact
from cli_jax.data.sources import RowFile
from cli_jax.experiment import load
from cli_jax.image.preprocess import make_tiles, open_image
from cli_jax.train.setup import make_setup
from tests.evaluate.eval_small import load_command, save_workdir

SQUARE = ImageConfig(aspect_ratio="square")
THREE = ImageConfig(aspect_ratio="anyres_max_1", grid_pinpoints=((8, 24),))
VISION = VisionConfig(image_size=8, patch_size=2)


def samples(n=300, features=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)).astype(np.float32) * rng.uniform(0.1, 9, features)
    y = np.argmax(x / x.std(axis=0) @ rng.normal(size=(features, classes)), axis=1)
    thirds = np.arange(n) % 3
    return x.astype(np.float32), y, thirds == 0, thirds == 1


def test_the_regression_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y, fit, _ = samples()
    y = np.where(np.random.default_rng(1).random(len(y)) < 0.2, 0, y)  # not separable
    ours = np.asarray(regression._fitted(x, y, fit.astype(np.float32), 3))
    for found, penalty in zip(ours, PENALTIES, strict=True):
        theirs = linear.LogisticRegression(C=1 / (penalty * fit.sum()), tol=1e-8, max_iter=5000)
        assert np.mean(theirs.fit(x[fit], y[fit]).predict(x) == found) > 0.99


def test_what_is_linear_is_read_out_and_noise_is_not():
    x, y, fit, choose = samples(n=600)
    rest = ~fit & ~choose
    assert np.mean(read_out(x, y, fit, choose, 3)[rest] == y[rest]) > 0.93
    noise = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    commonest = np.mean(y[rest] == np.bincount(y[fit]).argmax())
    assert np.mean(read_out(noise, y, fit, choose, 3)[rest] == y[rest]) < commonest + 0.06


def test_the_scored_answers_are_not_looked_at():
    x, y, fit, choose = samples()
    before = read_out(x, y, fit, choose, 3)
    rest = ~fit & ~choose
    np.testing.assert_array_equal(before, read_out(x, np.where(rest, 0, y), fit, choose, 3))
    assert (before != read_out(x, np.where(fit, 0, y), fit, choose, 3)).any()


def test_the_penalty_is_chosen_by_its_own_samples(monkeypatch):
    """By those of `choose` alone, the larger of two penalties that are equally good."""
    y = np.zeros(6, int)
    fit, choose = np.arange(6) < 2, (np.arange(6) >= 2) & (np.arange(6) < 4)
    right = np.array(
        [[1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]
    )
    monkeypatch.setattr(regression, "_fitted", lambda *_: 1 - right)
    found = read_out(np.ones((6, 1), np.float32), y, fit, choose, 2)
    assert list(PENALTIES) == sorted(PENALTIES, reverse=True)
    np.testing.assert_array_equal(found, 1 - right[1])


def pictures(n=240):
    """Two words in three places; every third picture is scored, every third of the rest chooses."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(n):
        known = [
            Fact(category, word, place, 3, int(rng.integers(0, 3)))
            for place in range(3)
            for category, word in (("colour", "black"), ("shape", "circles"))
            if (i + place) % 4 or word == "black"
        ]
        use = "score" if i % 3 == 0 else "choose" if i % 3 == 1 and i % 2 else "fit"
        found.append(Picture("", "", tuple(known), use))
    return found


def test_a_planted_signal_is_found_in_its_layer_and_category():
    given = pictures()
    rng = np.random.default_rng(1)
    features = rng.normal(size=(3, len(given), 3, 4)).astype(np.float32)
    for i, picture in enumerate(given):
        for fact in picture.facts:
            if fact.category == "colour":
                features[1, i, fact.place, 2] = fact.value + 0.1 * rng.normal()
            if fact.category == "shape":
                features[2, i, fact.place, 0] = -fact.value + 0.1 * rng.normal()
    found = score(features, given, ("pixels", "0", "1"))
    assert found.categories == ("colour", "shape")
    planted = np.array([[0, 0], [1, 0], [0, 1]], bool)
    assert (found.accuracy[planted] > 0.95).all()
    assert (found.accuracy[~planted] < 0.48).all()
    scored = [fact for picture in given if picture.use == "score" for fact in picture.facts]
    assert found.scored.tolist() == [
        sum(fact.category == name for fact in scored) for name in ("colour", "shape")
    ]
    assert (np.abs(found.commonest - 1 / 3) < 0.12).all()
    assert found.table().splitlines()[0].split() == ["layer", "colour", "shape"]
    assert found.table().splitlines()[-1].split()[0] == "answers"


def numbered(places, width, height, image, vision=VISION):
    """The place that every patch of the tiles belongs to, -1 for none, by drawing it."""
    columns = np.repeat(np.arange(places), width // places)
    row = np.stack([np.full(width, 10), 40 * columns, np.zeros(width)], axis=-1)
    picture = np.broadcast_to(row, (height, width, 3)).astype(np.uint8)
    tiles = make_tiles(Image.fromarray(picture), image, vision, single=True)
    g, p = vision.grid, vision.patch_size
    greens = tiles[..., 1].reshape(-1, g, p, g, p).mean(axis=(2, 4)).reshape(-1)
    return greens / 40


@pytest.mark.parametrize(
    ("places", "width", "image"), [(3, 24, THREE), (4, 8, SQUARE), (2, 16, SQUARE)]
)
def test_places_lie_side_by_side(places, width, image):
    at = place_patches(width, 8, places, image, VISION)
    seen = numbered(places, width, 8, image)
    assert at.shape == (places, VISION.num_patches * (3 if image is THREE else 1) // places)
    assert len(np.unique(at)) == at.size
    for place in range(places):
        np.testing.assert_allclose(seen[at[place]], place, atol=0.2)


@pytest.mark.parametrize(
    ("size", "places", "image", "reason"),
    [
        ((8, 8), 3, SQUARE, "4 columns of patches cannot be shared by 3 places"),
        ((24, 10), 3, THREE, "do not fill their tiles"),
        ((8, 8), 2, ImageConfig(aspect_ratio="pad"), "aspect_ratio=pad"),
    ],
)
def test_pictures_without_places_are_refused(size, places, image, reason):
    with pytest.raises(PlaceError, match=reason):
        place_patches(*size, places, image, VISION)


def test_summaries():
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    at = np.array([[0, 5], [2, 1]])
    pooled, cells = (np.asarray(summarize(x, at, how)) for how in ("pooled", "cells"))
    assert pooled.shape == cells.shape == (2, 2, 6)
    np.testing.assert_allclose(pooled[1, 0, :3], (x[1, 0] + x[1, 5]) / 2, rtol=1e-6)
    np.testing.assert_allclose(pooled[1, 1, 3:], np.maximum(x[1, 2], x[1, 1]))
    np.testing.assert_array_equal(cells[0, 1], np.concatenate([x[0, 2], x[0, 1]]))


def test_pixels_of_patches():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    found = np.asarray(patch_pixels(tiles, SQUARE, VISION)).reshape(2, 3, 4, 4, 2, 2, 3)
    expected = (tiles[1, 2, 4:6, 6:8] / 255 - 0.5) / 0.5
    np.testing.assert_allclose(found[1, 2, 2, 3], expected, atol=1e-6)


def test_principal_components():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) * np.array([1, 9, 2, 0.1, 5, 0.2]) + 3
    found = principal_components(x.astype(np.float32), 3)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-5)
    assert np.abs(found).argmax(axis=0).tolist() == [1, 4, 2]
    wider = principal_components(x.astype(np.float32), 8)  # a tower wider than its patches
    assert wider.shape == (6, 8)
    np.testing.assert_array_equal(wider[:, :3], found)
    assert not wider[:, 6:].any()


def test_batches_are_filled_up():
    tiles = [np.full((1, 2), i) for i in range(5)]
    found = list(in_batches(iter(tiles), 2))
    assert [count for count, _ in found] == [2, 2, 1]
    assert all(stack.shape == (2, 1, 2) for _, stack in found)
    assert found[2][1].sum() == 8


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A tower that nothing has trained, in a workdir."""
    folder = tmp_path_factory.mktemp("probe")
    pretrain_small.write_data(folder / "data", scenes=120)
    experiment = pretrain_small.experiment(folder / "data")
    setup = make_setup(experiment)
    params = jax.jit(lambda: setup.init_params(0))()
    return save_workdir(folder / "run", experiment, params)


def test_pictures_are_used_for_one_thing_each(workdir):
    experiment = load(workdir)
    found, left_out = read_pictures(experiment)
    assert left_out == 0
    file = RowFile(experiment.data.train[0].path)
    assert sorted(picture.path for picture in found) == sorted(
        file[i]["image"] for i in range(len(file))
    )
    scenes = {
        use: {picture.path.split("-")[0] for picture in found if picture.use == use}
        for use in ("fit", "choose", "score")
    }
    assert [len(scenes[use]) for use in scenes] == [77, 19, 24]
    assert not scenes["fit"] & scenes["score"]
    assert not scenes["fit"] & scenes["choose"]
    assert not scenes["choose"] & scenes["score"]


def rows_of(experiment):
    """The only training file, its rows, and where their pictures are."""
    (source,) = experiment.data.train
    file = RowFile(source.path)
    root = source.image_root or str(Path(source.path).parent)
    return source, [file[i] for i in range(len(file))], root


def test_a_scene_of_two_files_is_used_for_one_thing(workdir, tmp_path):
    experiment = load(workdir)
    source, rows, root = rows_of(experiment)
    halves = []
    for i, some in enumerate((rows[0::2], rows[1::4])):  # all scenes, and half of them once more
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(some))
        halves.append(dataclasses.replace(source, path=str(path), image_root=root))
    data = dataclasses.replace(experiment.data, train=tuple(halves))
    found, _ = read_pictures(dataclasses.replace(experiment, data=data))
    uses = {}
    for picture in found:
        uses.setdefault(picture.path.split("-")[0], set()).add(picture.use)
    assert len(uses) == 120
    assert all(len(each) == 1 for each in uses.values())


def test_words_of_too_few_scenes_are_left_out_by_name(capsys):
    given = pictures()
    rare = Fact("colour", "mauve", 0, 3, 1)
    given[0] = dataclasses.replace(given[0], facts=(*given[0].facts, rare), use="score")
    features = np.random.default_rng(1).normal(size=(1, len(given), 3, 4)).astype(np.float32)
    found = score(features, given, ("0",))
    assert "too few scenes of the training files have it: mauve" in capsys.readouterr().out
    asked = [f for p in given if p.use == "score" for f in p.facts if f.category == "colour"]
    assert found.scored[0] == len(asked) - 1
    alone = dataclasses.replace(given[0], facts=(rare,))
    with pytest.raises(ProbeError, match="no word is in enough scenes"):
        score(features[:, :1], [alone], ("0",))


def test_the_command_probes_every_layer(workdir, tmp_path, capsys):
    out = tmp_path / "probe"
    assert load_command("analyze").main(["probe", f"--workdir={workdir}", f"--output={out}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = [line[0] for line in lines]
    assert names == ["layer", "pixels", "0", "1", "2", "commonest", "answers"]
    assert lines[0] == ["layer", "all", "colour"]
    saved = np.load(out / "probe.npz")
    assert saved["accuracy"].shape == (4, 2)
    assert saved["layers"].tolist() == names[1:-2]
    assert saved["scored"].tolist() == [48 * 3, 48 * 9]
    # Dots of three colors on gray: their mean says how many there are of each.
    assert (saved["accuracy"][0] > saved["commonest"] + 0.2).all()
    assert (out / "probe.png").stat().st_size > 10_000


def test_a_run_that_held_nothing_out_cannot_be_probed(workdir, tmp_path, capsys):
    experiment = load(workdir)
    with pytest.raises(ProbeError, match=r"trained on all its pictures.*config\.data\.held_out"):
        read_pictures(
            dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, held_out=0.0))
        )
    command = ["probe", f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert load_command("analyze").main(command) == 1
    assert "config.json does not exist" in capsys.readouterr().err


def test_rows_that_training_skips_are_left_out_and_broken_pictures_named(workdir, tmp_path):
    experiment = load(workdir)
    source, rows, root = rows_of(experiment)
    rows[0] = rows[0] | {"image": "gone.png"}
    rows[1] = {key: value for key, value in rows[1].items() if key != "image"}
    rows[2] = rows[2] | {"conversations": [{"from": "human", "value": "<image>\nHello?"}]}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spoiled = dataclasses.replace(source, path=str(tmp_path / "rows.json"), image_root=root)
    data = dataclasses.replace(experiment.data, train=(spoiled,))
    found, left_out = read_pictures(dataclasses.replace(experiment, data=data))
    assert (len(found), left_out) == (len(rows) - 3, 3)
    whole = (Path(found[0].root) / found[0].path).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) * 2 // 3])
    half = dataclasses.replace(found[0], root=str(tmp_path), path="half.png")
    with pytest.raises(ProbeError, match=r"half\.png cannot be decoded .*remove its row"):
        read_tiles(half, experiment, (24, 8))


def test_pictures_of_several_sizes_are_refused(workdir, tmp_path):
    experiment = load(workdir)
    found, _ = read_pictures(experiment)
    image = open_image(found[0].root, found[0].path, 10**6)
    image.resize((30, 10)).save(tmp_path / "large.png")
    other = dataclasses.replace(found[0], root=str(tmp_path), path="large.png")
    with pytest.raises(ProbeError, match=r"large.png has \(30, 10\) pixels and others \(24, 8\)"):
        read_tiles(other, experiment, (24, 8))
