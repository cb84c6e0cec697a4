"""A whole pretraining: it learns, goes on bitwise, reads no evaluation file and serves a model."""

import dataclasses
import json

import numpy as np
import pretrain_small
import pytest

from cli_jax.data import pipeline, sources
from cli_jax.dryrun.run import dry_run
from cli_jax.evaluate.workdir import open_run
from cli_jax.experiment import ConfigError, from_dict, load, to_dict
from cli_jax.hf.workdir import open_workdir
from cli_jax.pretrain.held_out import HeldOut, retrieval
from cli_jax.train import loop
from cli_jax.train.checkpoint import FOLDER, load_params
from cli_jax.train.initial import init_state, load_initial
from cli_jax.train.run import run
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten
from cli_jax.train.step import lower_step
from tests.train.train_tiny import QUICK

STEPS = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pretrain_small.write_data(folder, scenes=120)
    return folder


@pytest.fixture(scope="module")
def experiment(root):
    return pretrain_small.experiment(
        root, total_steps=STEPS, checkpoint={"every": STEPS // 2}, log={"every": 4}
    )


@pytest.fixture(scope="module")
def go(experiment):
    """Runs it in a workdir; all runs share one compiled update."""
    compiled = lower_step(make_setup(experiment)).compile(QUICK)

    def started(workdir):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "compile_step", lambda _: compiled)
            return run(experiment, str(workdir))

    return started


@pytest.fixture(scope="module")
def opened():
    """The names of all files of rows that were opened."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        original = sources.RowFile.__init__
        patch.setattr(
            sources.RowFile,
            "__init__",
            lambda self, path: (names.append(str(path)), original(self, path))[1],
        )
        yield names


@pytest.fixture(scope="module")
def workdir(go, opened, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert go(folder) is True
    return folder


def lines(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_the_loss_falls_and_unseen_pictures_find_their_captions(workdir):
    losses = [line["loss"] for line in lines(workdir, "metrics.jsonl")]
    one_in = 16  # what giving every pair of a batch the same right probability costs
    constant = np.log(one_in) - (one_in - 1) * np.log(1 - 1 / one_in)
    assert np.mean(losses[-5:]) < constant - 0.4
    first, last = lines(workdir, "held_out.jsonl")
    assert (first["step"], last["step"]) == (STEPS // 2, STEPS)
    assert last["pictures"] == 48
    assert last["loss"] < first["loss"]
    assert last["retrieval"] > 4 / last["captions"]


def test_no_file_but_the_training_file_is_opened(workdir, opened, root):
    assert workdir.exists()
    assert set(opened) == {str(root / "train.json")}


def test_a_run_that_was_killed_ends_in_the_same_bits(go, workdir, tmp_path, monkeypatch):
    batches = 0
    following = pipeline.Loader.__next__

    def fails_at_the_end(self):
        nonlocal batches
        batches += 1
        if batches == STEPS * 3 // 4:
            raise RuntimeError("killed")
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Loader, "__next__", fails_at_the_end)
        with pytest.raises(RuntimeError, match="killed"):
            go(tmp_path)
    assert len(lines(tmp_path, "held_out.jsonl")) == 1
    with monkeypatch.context() as patch:  # once more, between the last save and its measurement
        patch.setattr(HeldOut, "measure", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            go(tmp_path)
    assert len(lines(tmp_path, "held_out.jsonl")) == 1
    assert go(tmp_path) is True
    saved = [
        json.loads((folder / FOLDER / str(STEPS) / "metadata" / "metadata").read_text())["arrays"]
        for folder in (tmp_path, workdir)
    ]
    assert saved[0] == saved[1]
    assert sum("vision_tower" in path and "optimizer" not in path for path in saved[0]) > 10
    assert lines(tmp_path, "held_out.jsonl") == lines(workdir, "held_out.jsonl")


def test_a_model_takes_the_tower_and_nothing_else(workdir, experiment):
    base = to_dict(experiment) | {"objective": "next_token", "init_from": str(workdir)}
    data = base["data"] | {"template": "question_first", "captions": "", "held_out": 0.0}
    setup = make_setup(from_dict(base | {"data": data}))
    loaded, sentence = load_initial(setup)
    pretrained = flatten(load_params(workdir))
    tower = {path for path in pretrained if path.startswith("vision_tower/")}
    assert set(loaded) == tower
    assert f"{len(tower)} arrays from {workdir}\nnot used: " in sentence
    assert "text_tower/" in sentence.split("new: ")[0]
    for part in ("language_model/embed_tokens", "multi_modal_projector/linear_1", "lm_head"):
        assert f"{part}/" in sentence
    started = flatten(init_state(setup, loaded).params)
    assert set(started) == set(flatten(setup.state.params))
    for path in tower:
        np.testing.assert_array_equal(started[path], pretrained[path], err_msg=path)
    for path in set(started) - tower:
        constant = path.endswith(("scale", "bias"))
        assert (np.std(started[path]) > 0.01) != constant, path


def test_who_needs_a_whole_model_says_so(workdir, experiment):
    for opener in (open_run, open_workdir):
        with pytest.raises(ConfigError, match=r"objective=siglip, not a model that answers"):
            opener(workdir)
    with pytest.raises(ConfigError, match=r"not config\.objective=siglip"):
        dry_run(experiment, "v5e:2x2")


def test_questions_at_the_end_are_refused(experiment, tmp_path):
    asking = dataclasses.replace(
        experiment, eval=dataclasses.replace(experiment.eval, path="val.json")
    )
    with pytest.raises(ConfigError, match=r"config.eval.path=.*val.json asks questions"):
        run(asking, str(tmp_path))


def test_the_order_of_the_data_is_guarded(workdir, experiment):
    data = dataclasses.replace(experiment.data, captions="full")
    state = json.loads((workdir / FOLDER / str(STEPS) / "data/process_0-of-1.json").read_text())
    model = experiment.model
    loader = pipeline.make_loader(data, model.image, model.vision, seed=0, rows_per_process=16)
    with pytest.raises(ConfigError, match=r"data\.captions was 'coarse' and is 'full'"):
        loader.set_state(state)
    loader.close()


def test_the_objective_is_one_of_two(root):
    with pytest.raises(ConfigError, match=r"config.objective must be one of"):
        pretrain_small.experiment(root, objective="clip")


def test_a_saved_experiment_comes_back(workdir, experiment):
    assert load(workdir) == experiment


def test_retrieval_counts_equal_captions_once():
    caption = np.eye(3)[[0, 1, 0, 2]]
    picture = np.eye(3)[[0, 1, 0, 1]]
    assert retrieval(picture, caption, [b"a", b"b", b"a", b"c"]) == {
        "retrieval": 0.75,
        "pictures": 4,
        "captions": 3,
    }
