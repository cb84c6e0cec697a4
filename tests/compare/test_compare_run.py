"""A whole comparison on a tiny set: fairness, resumption, refusals, and what is left."""

import contextlib
import json
import shutil

import compare_tiny
import numpy as np
import pytest
from compare_tiny import config

from cli_jax.compare import runs
from cli_jax.compare.claims import claim, claimed
from cli_jax.compare.command import compare, redraw
from cli_jax.compare.config import HELD_OUT
from cli_jax.compare.progress import Progress
from cli_jax.compare.runs import Run
from cli_jax.experiment import ConfigError
from cli_jax.hf.error import ConversionError
from cli_jax.train.checkpoint import load_params, stored_arrays
from cli_jax.train.loop import TrainingError
from cli_jax.train.state import flatten

ARMS, SEEDS = ("none", "cli", "layer_1"), (0, 1)


def workdir(folder, arm, seed, stage="stage2"):
    return Run("random", 1.0, seed, arm).folder(folder) / stage


def comparable(folder):
    """The results without times."""
    results = json.loads((folder / "results.json").read_text())
    for cell in results["cells"]:
        for row in cell["rows"]:
            assert row.pop("seconds_per_update") > 0
    return results


def test_everything_is_left(finished):
    left = {path.name for path in finished.folder.iterdir()}
    report = {"results.md", "results.json", "figures"}
    assert left == {"protocol.json", "splits", "runs", ".lock", *report}
    figures = {path.name for path in (finished.folder / "figures" / "random_1").iterdir()}
    assert figures == {
        "accuracy_val.png",
        "accuracy_colors.png",
        "selection_best_layer.png",
        "curves.png",
        "gates_cli.png",
    }
    for path in (finished.folder / "figures").rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    log = Run("random", 1.0, 1, "cli").folder(finished.folder) / "log.txt"
    assert "new: fusion/*" in log.read_text()


def test_all_arms_see_the_same_batches_in_the_same_order(finished):
    assert set(finished.batches) == {(a, s, n) for a in ARMS for s in SEEDS for n in (2, 4)}
    for seed in SEEDS:
        for steps in (2, 4):
            first, *others = (finished.batches[arm, seed, steps] for arm in ARMS)
            assert len(first) == steps
            assert all(other == first for other in others)
    assert finished.batches["none", 0, 4] != finished.batches["none", 1, 4]


def test_all_arms_start_from_the_same_tower_and_decoder(finished):
    """Stage 1 trains neither, so its checkpoints still hold what the seed gave."""

    def start(arm, seed):
        leaves = flatten(load_params(workdir(finished.folder, arm, seed, "stage1")))
        return {p: x for p, x in leaves.items() if p.startswith(("vision_", "language_", "lm_"))}

    for seed in SEEDS:
        wanted = start("none", seed)
        assert len(wanted) > 20
        for arm in ARMS[1:]:
            for path, leaf in start(arm, seed).items():
                np.testing.assert_array_equal(leaf, wanted[path], err_msg=f"{arm} {path}")
    kernel = "language_model/layers/mlp/up_proj/kernel"
    assert not np.array_equal(start("none", 0)[kernel], start("none", 1)[kernel])


def test_the_second_stage_starts_where_the_first_ended(finished):
    first = workdir(finished.folder, "cli", 0, "stage1")
    saved = json.loads((workdir(finished.folder, "cli", 0) / "config.json").read_text())
    assert saved["init_from"] == str(first)
    assert saved["optimizer"]["groups"] == []
    assert "fusion/agf/gate_bias" in stored_arrays(first)
    assert "new: none" in (first.parent / "log.txt").read_text()


def test_candidates_meet_the_evaluation_only_if_chosen(finished):
    (selection,) = comparable(finished.folder)["cells"][0]["selections"]
    for seed in SEEDS:
        answered = workdir(finished.folder, "layer_1", seed)
        assert (answered / f"results_{HELD_OUT}.json").is_file()
        assert (answered / "results_val.json").is_file() == (selection["arm"] == "layer_1")
    means = {arm: np.mean(scores) for arm, scores in selection["scores"].items()}
    assert means[selection["arm"]] == max(means.values())


def test_the_held_out_curve_is_asked_and_its_checkpoints_removed(finished):
    answered = workdir(finished.folder, "cli", 1)
    assert json.loads((answered / f"results_{HELD_OUT}_2.json").read_text())["step"] == 2
    assert [path.name for path in (answered / "checkpoints").iterdir()] == ["4"]


def test_interrupted_again_and_again_it_ends_the_same(finished, data, tmp_path, monkeypatch):
    """Seed 0 alone, unplugged in a first stage, between checkpoints of a second, and in an arm."""
    folder, done, updates = tmp_path / "out", Progress.done, []

    def unplugged(progress, step, values=None):
        updates.append(step)
        if len(updates) in (2, 7, 10):
            raise RuntimeError("unplugged")
        done(progress, step, values)

    alone = config(data, seeds=[0])
    alone["compare"] |= {"arms": alone["compare"]["arms"][:2], "select": []}
    monkeypatch.setattr(Progress, "done", unplugged)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="unplugged"):
            compare(alone, folder)
        assert not (folder / "results.json").exists()
    compare(alone, folder)
    assert updates == [1, 2, 1, 2, 1, 2, 3, 3, 4, 1, 1, 2, 1, 2, 3, 4]
    for arm in ("none", "cli"):
        places = [workdir(each, arm, 0) for each in (folder, finished.folder)]
        a, b = (flatten(load_params(place)) for place in places)
        for path, leaf in a.items():
            np.testing.assert_array_equal(leaf, b[path], err_msg=f"{arm} {path}")
        for name in ("val", HELD_OUT, f"{HELD_OUT}_2"):
            answers = [(place / f"predictions_{name}.jsonl").read_text() for place in places]
            assert answers[0] == answers[1]


def test_finished_runs_are_left_alone(finished, data, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.folder, tmp_path / "out")
    # A copy lies elsewhere, and a run's config names its data: that is another training.
    with pytest.raises(ConfigError, match=r"stage1 holds a training with another config\.data"):
        compare(config(data), folder)
    monkeypatch.setattr("cli_jax.compare.runs.train", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr("cli_jax.compare.runs.evaluate", lambda *_, **__: pytest.fail("it asked"))
    before = comparable(finished.folder)
    compare(config(data), finished.folder)
    assert comparable(finished.folder) == before


def test_processes_share_the_runs(finished, data, tmp_path, capsys):
    """What another process is at is left to it; the last one to end reports everything."""
    settings = config(data, seeds=[0])
    theirs = Run("random", 1.0, 0, "none")
    with claim(theirs, tmp_path) as free:
        assert free
        compare(settings, tmp_path)
    assert "another process is at none, seed 0" in capsys.readouterr().out
    assert {path.name for path in theirs.folder(tmp_path).iterdir()} == {".lock"}
    (cell,) = comparable(tmp_path)["cells"]
    assert [row["label"] for row in cell["rows"]] == ["cli"]
    assert cell["unfinished"] == ["none", "best layer"]
    compare(settings, tmp_path)
    assert "another process" not in capsys.readouterr().out
    (cell,) = comparable(tmp_path)["cells"]
    assert cell["unfinished"] == []
    assert len(cell["selections"]) == 1
    for arm in ARMS:
        a, b = (flatten(load_params(workdir(each, arm, 0))) for each in (tmp_path, finished.folder))
        for path, leaf in a.items():
            np.testing.assert_array_equal(leaf, b[path], err_msg=f"{arm} {path}")


def test_runs_that_others_are_at_are_tried_again_while_there_is_other_work(tmp_path):
    first, second = (Run("random", 1.0, 0, arm) for arm in ("none", "cli"))
    with contextlib.ExitStack() as other:
        other.enter_context(claim(first, tmp_path))
        with contextlib.closing(claimed([first, second], tmp_path)) as mine:
            assert next(mine) == second
            with claim(second, tmp_path) as free:
                assert not free
            other.close()  # the other process was killed
            assert next(mine) == first
            assert next(mine, None) is None
    with claim(first, tmp_path) as free:
        assert free


def test_an_encoder_that_is_missing_does_not_become_part_of_a_protocol(data, tmp_path):
    encoders = [{"name": "random"}, {"name": "gone", "path": str(tmp_path / "gone")}]
    with pytest.raises(ConversionError, match=r"/gone does not exist"):
        compare(config(data, encoders=encoders), tmp_path / "out")
    assert not (tmp_path / "out" / "protocol.json").exists()


def test_a_model_that_does_not_fit_an_arm_does_not_become_part_of_a_protocol(
    finished, data, tmp_path
):
    arms = [compare_tiny.arm("none", "none"), compare_tiny.arm("cli", "cli", rank=3)]
    settings = config(data, arms=arms, select=[])
    settings["init_from"] = str(workdir(finished.folder, "cli", 0))
    with pytest.raises(ConfigError, match=r"the arm 'cli': config\.init_from=.*lora_A: .* there"):
        compare(settings, tmp_path / "out")
    assert not (tmp_path / "out" / "protocol.json").exists()


def test_questions_without_pictures_do_not_stop_a_comparison(data, quick, tmp_path):
    asked = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]
    (data / "text.json").write_text(json.dumps([{"id": "q", "conversations": asked}]))
    settings = config(
        data,
        arms=[compare_tiny.arm("none", "none"), compare_tiny.arm("cli", "cli")],
        select=[],
        seeds=[0],
        evals=[{"name": "text", "path": "text.json"}],
    )
    compare(settings, tmp_path)
    answered = workdir(tmp_path, "cli", 0)
    drawn = json.loads((answered / "gates.json").read_text())
    assert drawn["written"] == []
    assert "holds no picture whose gates could be read" in drawn["problem"]
    (cell,) = comparable(tmp_path)["cells"]
    assert [row["label"] for row in cell["rows"]] == ["none", "cli"]


def test_the_bar_counts_what_is_done_and_what_never_will_be():
    with Progress(total=24, finished=6) as progress:
        progress.begin("a stage that goes on after its second update")
        for step in (3, 4):
            progress.done(step)
        assert (progress._bar.n, progress._bar.initial, progress._bar.total) == (10, 8, 24)
        progress.begin("a stage that diverges at its third update")
        for step in (1, 2):
            progress.done(step)
        progress.fail(6)
        assert (progress._bar.n, progress._bar.total) == (12, 20)
        for finished in (11, 18):  # by all processes; it counts for the time left
            progress.reached(finished)
        assert (progress._bar.n, progress._bar.initial) == (18, 8)


def test_a_changed_config_or_file_is_refused(finished, data, tmp_path):
    protocol = (finished.folder / "protocol.json").read_text()
    for change, text in (
        ({"seeds": [0, 1, 2]}, r"compare\.seeds was \[0, 1\] and is \[0, 1, 2\].*new --output"),
        ({"stage2": {"steps": 5}}, r"compare\.stage2\.steps was 4 and is 5"),
    ):
        with pytest.raises(ConfigError, match=text):
            compare(config(data, **change), finished.folder)
    moved = shutil.copytree(data, tmp_path / "data")
    rows = json.loads((moved / "val.json").read_text())
    (data / "val.json").rename(data / "val_before.json")
    (data / "val.json").write_text(json.dumps(rows[:-1]))
    try:
        with pytest.raises(ConfigError, match=r"splits\.evals\.val\.questions was 12 and is 11"):
            compare(config(data), finished.folder)
    finally:
        (data / "val_before.json").rename(data / "val.json")
    assert (finished.folder / "protocol.json").read_text() == protocol


def test_an_arm_that_diverges_does_not_stop_the_others(data, quick, tmp_path, monkeypatch):
    arms = [compare_tiny.arm(name, name) for name in ("none", "cli")]
    settings = config(data, arms=arms, select=[], seeds=[0])
    settings["compare"]["stage1"]["steps"] = 0
    tried = []

    def train(experiment, *args, **kwargs):
        tried.append(experiment.name.split()[-1])
        if experiment.name.endswith("none"):
            raise TrainingError("loss is nan at step 2: stopped")
        return honest(experiment, *args, **kwargs)

    honest = runs.train
    monkeypatch.setattr(runs, "train", train)
    compare(settings, tmp_path)
    assert tried == ["none", "cli"]
    (cell,) = comparable(tmp_path)["cells"]
    assert [row["label"] for row in cell["rows"]] == ["cli"]
    failed = "**Failed: none, seed 0, random, 100% of the data**: loss is nan at step 2: stopped"
    assert failed in (tmp_path / "results.md").read_text().splitlines()
    compare(settings, tmp_path)
    assert tried == ["none", "cli"]  # nothing is tried again
    (tmp_path / "runs/random/1/none/seed_0/failed.json").unlink()
    monkeypatch.setattr(runs, "train", honest)
    compare(settings, tmp_path)
    (cell,) = comparable(tmp_path)["cells"]
    assert [row["label"] for row in cell["rows"]] == ["none", "cli"]
    assert cell["failed"] == cell["unfinished"] == []


def test_report_only_redraws_what_is_there(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "out")
    for path in ("results.md", "results.json", "figures"):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (workdir(folder, "cli", 1) / "results_val.json").unlink()
    answered = workdir(folder, "cli", 0) / "predictions_val.jsonl"
    first, *others = answered.read_text().split("\n")
    odd = json.dumps(json.loads(first) | {"prediction": "a\u2028b"}, ensure_ascii=False)
    answered.write_text("\n".join([odd, *others]))  # a line separator is no end of a line here
    written = redraw(folder)
    assert all(path.is_file() for path in written)
    (cell,) = comparable(folder)["cells"]
    rows = {row["label"]: row for row in cell["rows"]}
    assert rows["cli"]["seeds"] == [0]
    assert cell["unfinished"] == ["cli"]
    text = (folder / "results.md").read_text()
    assert "Not finished: cli" in text
    assert "cli (1 of 2 seeds)" in text
    edited = json.loads((folder / "protocol.json").read_text())
    edited["config"]["compare"]["seeds"] = [0]
    (folder / "protocol.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match="was edited after it was fixed"):
        redraw(folder)
