"""Similarity of vision layers: against transformers' hidden states, and groups by brute force."""

import ast
import dataclasses
import itertools
import re
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from cli_jax.analysis import layers
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.config import VisionConfig
from cli_jax.experiment import from_dict, to_dict
from cli_jax.fusion import base
from cli_jax.image.preprocess import make_tiles, normalize
from cli_jax.model.vlm import build
from tests.evaluate import eval_small as small


def write_questions(folder):
    """Rows with one picture, two, none, and one that is missing; the wide one has most tiles."""
    wide = small.save_picture(folder, "wide.png", (70, 40), 1)
    dot = small.save_picture(folder, "dot.png", (9, 14), 2)
    rows = [
        small.question(0, wide),
        small.question(1, "nowhere.png"),
        small.question(2),
        small.question(3, [dot, wide]),
        small.question(4, dot),
    ]
    return small.save_rows(folder, rows), [[wide], [dot, wide], [dot]]


class Setting:
    """An oracle model that reads files, and its similarity restated on torch's hidden states."""

    def __init__(self, folder, name):
        pytest.importorskip("torch")
        from tests.model import oracle

        self.case = oracle.case(name)
        model = self.case.config
        plain = to_dict(small.make_experiment(folder, name="none"))
        plain["model"] = {
            **{part: dataclasses.asdict(getattr(model, part)) for part in ("vision", "text")},
            "image": dataclasses.asdict(model.image),
            "has_newline": model.has_newline,
        }
        self.experiment = from_dict(plain)
        self.model = build(self.experiment.model, self.experiment.compute)
        self.folder = folder
        self.data, pictures = write_questions(folder)
        sums, self.tokens = 0.0, 0
        for names in pictures:
            for picture in names:
                image = Image.open(folder / picture)
                tiles = make_tiles(image, model.image, model.vision, single=len(names) == 1)
                pixels = normalize(tiles, model.image).transpose(0, 3, 1, 2)
                states = np.float64(oracle.reference_hidden_states(self.case, pixels))
                for tile, patch in np.ndindex(states.shape[1:3]):
                    token = states[:, tile, patch]
                    unit = token / np.sqrt((token**2).sum(axis=1))[:, None]
                    sums, self.tokens = sums + unit @ unit.T, self.tokens + 1
        self.expected = sums / self.tokens

    def similarity(self, **options):
        arguments = self.model, self.case.params, self.experiment, self.data, ""
        return layers.mean_similarity(*arguments, **options)


@pytest.fixture(scope="module", params=["siglip_qwen2", "clip_llama"])
def setting(request, tmp_path_factory):
    return Setting(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("tiles", [1, 5])
def test_similarity_equals_a_restatement_on_transformers_states(setting, tiles):
    """In batches of one tile, and of five, of which the last one is padded."""
    found, left_out = setting.similarity(batch_size=tiles)
    assert found.tokens == setting.tokens
    assert (found.tokens // 16) % 5 != 0
    assert found.pictures == 4
    blocks = setting.case.config.vision.num_hidden_layers  # CLIP's unused last one too
    assert found.sums.shape == (blocks + 1, blocks + 1) == setting.expected.shape
    assert found.mean() == pytest.approx(setting.expected, abs=2e-6)
    assert (found.mean() == found.mean().T).all()
    assert np.ptp(setting.expected) > 0.3  # else everything would agree with everything
    assert list(left_out) == ["q1"]
    assert "no such file" in left_out["q1"]


def test_tiles_come_in_order_and_are_not_kept():
    """However many samples there are, only those of one batch are alive."""
    alive, most = set(), 0

    def samples(count):
        for number in range(count):
            tiles = np.full((3, 2, 2, 3), number, np.uint8)
            alive.add(number)
            weakref.finalize(tiles, alive.discard, number)
            yield SimpleNamespace(tiles=tiles)
            del tiles

    seen = []
    for tiles, real in layers.tile_batches(samples(20), 7):
        assert tiles.shape == (7, 2, 2, 3)
        seen.append(tiles[real > 0, 0, 0, 0])
        assert not tiles[real == 0].any()
        most = max(most, len(alive))
    assert np.concatenate(seen).tolist() == np.repeat(np.arange(20), 3).tolist()
    assert most <= 4
    assert not alive


# ---- groups --------------------------------------------------------------------------------------


def similarity(rng, blocks):
    """A random symmetric matrix of blocks + 1 layers with ones on its diagonal."""
    S = rng.uniform(-1, 1, (blocks + 1, blocks + 1))
    S = (S + S.T) / 2
    np.fill_diagonal(S, 1)
    return S


def quality(S, groups):
    """The mean over blocks of a block's mean similarity to its group."""
    return np.mean([np.mean([S[i, j] for j in group]) for group in groups for i in group])


def every_split(blocks, groups):
    for cuts in itertools.combinations(range(2, blocks + 1), groups - 1):
        edges = (1, *cuts, blocks + 1)
        yield [range(a, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("blocks", [1, 2, 5, 9])
def test_the_split_is_the_best_of_all(blocks):
    for groups in range(1, blocks + 1):
        for seed in range(5):
            S = similarity(np.random.default_rng([seed, groups]), blocks)
            best = max(every_split(blocks, groups), key=lambda split: quality(S, split))
            found = layers.group_layers(S, groups)
            assert [(g.first, g.last) for g in found] == [(g[0], g[-1]) for g in best]
            for g, members in zip(found, best, strict=True):
                to_group = [np.mean([S[i, j] for j in members]) for i in members]
                assert g.medoid == members[int(np.argmax(to_group))]


def test_groups_that_are_plain_to_see_are_found():
    """Neighbors that are alike, the embeddings most of all like the last block."""
    depth = np.concatenate([[2.0], np.linspace(0, 0.2, 12), np.linspace(1, 1.2, 8), [2.0] * 4])
    S = np.exp(-np.abs(depth[:, None] - depth))
    found = layers.group_layers(S, 3)
    assert found == ((1, 12, 6), (13, 20, 16), (21, 24, 21))  # of equals the first


def test_the_summary_can_be_pasted():
    found = layers.Similarity(similarity(np.random.default_rng(3), 5), tokens=1, pictures=1)
    split = layers.group_layers(found.mean(), 3)
    text = layers.summary(found, split, last_layer=4)
    assert "4 feeds the projector, 5..5 nothing" in text
    pasted = dict(re.findall(r"^--config\.fusion\.(\S+)='(.*)'$", text, re.MULTILINE))
    assert list(pasted) == ["layer_concat.layers", "cli.taps"]
    vision = VisionConfig("clip", num_hidden_layers=5)
    for value in pasted.values():
        chosen = ast.literal_eval(value)
        assert base.taps(chosen, vision) == tuple((g.medoid,) for g in split)
    alone = layers.summary(found, layers.group_layers(found.mean(), 1), last_layer=5)
    assert "nothing" not in alone
    assert isinstance(ast.literal_eval(re.search(r"taps='(.*)'", alone)[1]), tuple)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir of a small cli model with questions."""
    folder = tmp_path_factory.mktemp("layers")
    experiment = small.make_experiment(folder)
    small.save_workdir(folder / "run", experiment, small.make_model(experiment)[1])
    write_questions(folder)
    return folder


def run(folder, *more, data="questions.json"):
    options = ["--workdir", folder / "run", "--data", folder / data, "--output", folder / "out"]
    return small.load_command("analyze").main(["layers", *map(str, options), *more])


def test_layers_writes_its_files(folder, capsys):
    assert run(folder, "--groups", "2") == 0
    with np.load(folder / "out" / "layers.npz") as found:
        assert found["layers"].tolist() == [0, 1, 2]
        assert found["similarity"].shape == (3, 3)
        assert found["groups"].tolist() == [[1, 1], [2, 2]]
        assert found["medoids"].tolist() == [1, 2]
        assert (found["last_layer"], found["pictures"]) == (2, 4)
        assert found["tokens"] > 0
    with Image.open(folder / "out" / "layers.png") as image:
        assert image.width > 500
    printed = capsys.readouterr().out
    assert "left out q1: ImageError: " in printed
    assert "--config.fusion.cli.taps='(1,2)'" in printed
    assert printed.count("written: ") == 2


def test_a_tower_without_numbers_is_a_clear_error(tmp_path):
    experiment = small.make_experiment(tmp_path, name="none")
    model, params = small.make_model(experiment)
    data, _ = write_questions(tmp_path)
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(AnalysisError, match="not finite"):
        layers.mean_similarity(model, broken, experiment, data, "", batch_size=5)


@pytest.mark.parametrize(
    ("more", "rows", "message"),
    [
        ([], [small.question(0)], "no picture that could be read: no row has a picture"),
        ([], [small.question(0, "nowhere.png")], "no such file"),
        (["--groups", "3"], [small.question(0)], "2 blocks cannot be split into 3 groups"),
    ],
)
def test_a_failure_is_one_line(folder, capsys, more, rows, message):
    small.save_rows(folder, rows, "bad.json")
    assert run(folder, *(more or ["--groups", "2"]), data="bad.json") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("analyze.py layers: ")
    assert message in line
