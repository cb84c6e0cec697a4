"""The report of answers that were written by hand: every number can be checked on paper."""

import json
import shutil

import numpy as np
import pytest
from compare_tiny import config, write_data

from cli_jax.analysis.plots import PlotError
from cli_jax.compare import command, plots, protocol, splits
from cli_jax.compare.bootstrap import interval
from cli_jax.compare.config import from_config
from cli_jax.compare.contrasts import contrasts, open_contrasts
from cli_jax.compare.report import report
from cli_jax.compare.runs import Run
from cli_jax.compare.summary import choose, summarize
from cli_jax.compare.table import markdown
from cli_jax.experiment import ConfigError
from cli_jax.output import OutputError

# Right (1) or wrong of the 12 questions, a color and a count for each of 6 pictures, by seed.
RIGHT = {
    "none": ["101010101010", "000000000000"],
    "cli": ["111110101010", "100000000000"],
    "layer_1": ["111111111111", "111111111111"],
}
HELD_OUT = {"none": [0.5, 0.25], "layer_1": [0.25, 0.75], "cli": [1.0, 1.0]}
CONTRASTS = [{"arm": "cli", "against": "none"}, {"arm": "cli", "against": "best layer"}]


@pytest.fixture
def folder(tmp_path):
    data, folder = write_data(tmp_path / "data"), tmp_path / "out"
    comparison = from_config(config(data, contrasts=CONTRASTS), folder)
    cut = splits.cut(comparison)
    folder.mkdir()
    protocol.fix(comparison, cut.report, folder)
    splits.write(cut, folder)
    _, categories = splits.scenes_of(folder, "val")
    for arm, seeds in RIGHT.items():
        for seed, right in enumerate(seeds):
            workdir = Run("random", 1.0, seed, arm).workdir(folder)
            workdir.mkdir(parents=True)
            lines = [
                json.dumps({"category": c, "correct": r == "1"})
                for c, r in zip(categories, right, strict=True)
            ]
            (workdir / "predictions_val.jsonl").write_text("\n".join(lines) + "\n")
            cost = {"parameters": 2000, "trained_parameters": 1000 + seed, "steps": 4}
            cost |= {"forward_flops": 3.5e6, "update_flops": 1e7}
            cost["samples"] = {"drawn": 16, "skipped_rows": 0, "too_long_rows": 0}
            cost["seconds_per_update"] = 0.020 + 0.002 * seed
            overall = {"overall": {"exact_match": HELD_OUT[arm][seed]}, "bad_rows": []}
            metrics = "".join(json.dumps({"step": s, "loss": 3.0 - s / 2}) + "\n" for s in range(5))
            for name, content in (
                ("results_val.json", {"bad_rows": []}),
                ("results_held_out.json", overall),
                ("trained.json", cost),
                ("run.json", {"revision": "abc", "earlier_revisions": [], "devices": "1 x cpu"}),
            ):
                (workdir / name).write_text(json.dumps(content))
            aligned = workdir.parent / "stage1"
            aligned.mkdir()
            (aligned / "trained.json").write_text(json.dumps({"trained_parameters": 77}))
            (workdir / "metrics.jsonl").write_text(metrics)
    return folder


def summary(folder):
    fixed = protocol.read(folder)
    comparison = from_config(fixed["config"], folder)
    found = contrasts(comparison, folder)
    return summarize(comparison, folder, fixed) | {
        "contrasts": found,
        "open_contrasts": open_contrasts(comparison, found),
    }


def test_the_numbers(folder):
    results = summary(folder)
    (cell,) = results["cells"]
    rows = {row["label"]: row for row in cell["rows"]}
    assert list(rows) == ["none", "cli", "best layer (layer_1)"]
    cli = rows["cli"]["sets"]["val"]
    assert cli["by_seed"] == [8 / 12, 1 / 12]
    assert cli["mean"] == pytest.approx(9 / 24)
    assert cli["std"] == pytest.approx(7 / 12 / np.sqrt(2))
    # cli - none: seed 0 gains two counts of pictures 0 and 1, seed 1 a color of picture 0.
    assert cli["difference"]["mean"] == pytest.approx(3 / 24)
    scenes, _ = splits.scenes_of(folder, "val")
    differences = np.zeros((2, 12))
    differences[0, [1, 3]] = differences[1, 0] = 1
    assert cli["difference"] == interval(differences, scenes, draws=200)._asdict()
    assert cli["categories"]["count"]["difference"]["mean"] == pytest.approx(2 / 12)
    assert cli["categories"]["color"]["by_seed"] == [1.0, 1 / 6]
    assert (cli["questions"], cli["resampled"]) == (12, 6)
    colors = rows["cli"]["sets"]["colors"]
    assert colors["questions"] == 6
    assert colors["by_seed"] == [1.0, 1 / 6]
    assert rows["none"]["sets"]["val"]["difference"] is None
    assert rows["best layer (layer_1)"]["sets"]["val"]["difference"]["mean"] == pytest.approx(0.75)
    assert rows["cli"]["seconds_per_update"] == pytest.approx(0.021)
    assert rows["none"]["held_out"]["mean"] == pytest.approx(0.375)


def test_a_selection_goes_by_held_out_pictures_and_the_first_of_equals(folder):
    comparison = from_config(protocol.read(folder)["config"], folder)
    (choice,) = choose(comparison, folder, "random", 1.0)
    assert (choice.arm, choice.scores["layer_1"]) == ("layer_1", [0.25, 0.75])
    assert "cli" not in choice.scores  # the best of all, but not among those to choose from
    path = Run("random", 1.0, 1, "layer_1").workdir(folder) / "results_held_out.json"
    path.write_text(json.dumps({"overall": {"exact_match": 0.5}}))
    assert choose(comparison, folder, "random", 1.0)[0].arm == "none"
    path.unlink()
    assert choose(comparison, folder, "random", 1.0) == []
    assert "Not finished: best layer." in markdown(summary(folder), {})


def test_what_makes_runs_incomparable_is_said(folder):
    text = markdown(summary(folder), {})
    assert "could not be asked" not in text
    assert "other samples" not in text
    assert "77, then 1,000" in text
    workdirs = {arm: Run("random", 1.0, 0, arm).workdir(folder) for arm in RIGHT}
    bad = {"bad_rows": [{"id": "v1", "reason": "ImageError: gone"}]}
    for arm in RIGHT:
        for seed in (0, 1):
            (Run("random", 1.0, seed, arm).workdir(folder) / "results_val.json").write_text(
                json.dumps(bad)
            )
    assert "\n1 rows of val could not be asked and count as wrong in all" in markdown(
        summary(folder), {}
    )
    chosen = workdirs["none"] / "results_held_out.json"  # these decide selections
    chosen.write_text(json.dumps(json.loads(chosen.read_text()) | bad))
    assert "**0 to 1 rows of held_out could not be asked" in markdown(summary(folder), {})
    (workdirs["cli"] / "results_val.json").write_text(json.dumps({"bad_rows": []}))
    text = markdown(summary(folder), {})
    assert "**0 to 1 rows of val could not be asked, by run, and count as wrong: runs are" in text
    cost = json.loads((workdirs["cli"] / "trained.json").read_text())
    cost["samples"]["too_long_rows"] = 3
    (workdirs["cli"] / "trained.json").write_text(json.dumps(cost))
    assert "**cli: other samples than none saw, so not comparable" in markdown(summary(folder), {})


def test_contrasts_pair_runs_over_all_encoders(folder):
    fixed = protocol.read(folder)
    raw = fixed["config"] | {"compare": {**fixed["config"]["compare"]}}
    raw["compare"]["encoders"] = [{"name": "random"}, {"name": "other"}]
    raw["compare"]["seeds"] = [0, 1]
    # The other encoder's first seed answers as the first one's; its second seed is not finished.
    for arm in RIGHT:
        shutil.copytree(
            *(Run(each, 1.0, 0, arm).workdir(folder) for each in ("random", "other")),
        )
    comparison = from_config(raw, folder)
    rows = {(r["contrast"], r["encoder"]): r for r in contrasts(comparison, folder)}
    every, first, second = (rows["cli − none", name] for name in ("all", "random", "other"))
    assert [each["pairs"] for each in (every, first, second)] == [3, 2, 1]
    assert every["sets"]["val"]["by_pair"] == pytest.approx([2 / 12, 1 / 12, 2 / 12])
    assert every["sets"]["val"]["mean"] == pytest.approx(5 / 36)
    assert second["sets"]["colors"]["by_pair"] == [0.0]
    # Nothing is chosen for the other encoder while a candidate is not finished.
    assert rows["cli − best layer", "all"]["sets"]["val"]["mean"] == pytest.approx(-15 / 24)
    assert ("cli − best layer", "other") not in rows
    text = markdown(summary(folder), {}).splitlines()
    assert "| contrast | encoder (pairs of runs) | val | colors |" in text
    (line,) = [line for line in text if line.startswith("| cli − none, 100% of the data")]
    assert line.startswith("| cli − none, 100% of the data | all (2) | +12.5 [")


def test_the_text_says_it_all(folder):
    text = markdown(summary(folder), {"random_1": [("A title", "figures/a.png")]})
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| arm | val, %"))
    assert head == (
        "| arm | val, % | val − none | colors, % | colors − none | held out, % | trained "
        "| parameters | MFLOPs | ms/update |"
    )
    (cli,) = [line for line in lines if line.startswith("| cli | 37.5 ± 41.2 | +12.5 [")]
    assert cli.endswith("| 100.0 ± 0.0 | 77, then 1,000 | 2,000 | 3.5 | 21 |")
    assert "| none | 25.0 ± 35.4 |  | 50.0 ± 70.7 |  | 37.5 ± 17.7 |" in text
    assert "| arm | color (6) | count (6) |" in lines
    assert "| layer_1 | 50.0 | 25.0, 75.0 |" in lines
    assert "Chosen on held-out training pictures, accuracy there: **layer_1**." in lines
    assert "![A title](figures/a.png)" in lines
    assert '| layer_1 | `{"fusion": {"name": "none", "none": {"vision_layer": 1}}}` |' not in lines
    assert '`{"fusion": {"name": "none", "none": {"vision_layer": 1}}}` |' in text
    assert "Steps: 2 in stage 1, 4 in stage 2, of 4 rows. Seeds: 0, 1." in text
    assert "The code changed between runs" not in text
    assert "val: 12 questions about 6 scenes; colors: 6 questions about 6 scenes" in lines
    assert "Not finished" not in text


def test_other_code_in_some_runs_is_said(folder):
    path = Run("random", 1.0, 1, "cli").workdir(folder) / "run.json"
    for later in (
        {"revision": "abd", "earlier_revisions": []},
        {"revision": "abc", "earlier_revisions": ["abd"]},  # it went on with other code
    ):
        path.write_text(json.dumps({**later, "devices": "1 x cpu"}))
        assert "**The code changed between runs" in markdown(summary(folder), {})
    path.write_text(json.dumps({"revision": "abc", "earlier_revisions": [], "devices": "1 x cpu"}))
    assert "The code changed between runs" not in markdown(summary(folder), {})
    asked = {"bad_rows": [], "revision": "abd"}  # trained by one, asked by the other
    (path.parent / "results_val.json").write_text(json.dumps(asked))
    assert "**The code changed between runs" in markdown(summary(folder), {})


def test_a_contrast_of_an_open_selection_is_listed(folder):
    (Run("random", 1.0, 1, "layer_1").workdir(folder) / "results_held_out.json").unlink()
    text = markdown(summary(folder), {})
    assert "**Not finished: cli − best layer, 100% of the data.**" in text.splitlines()


def test_scenes_can_be_resampled_together(folder):
    """The pictures are sceneN-M.png: by their names without M there are fewer, and all in one."""
    names, _ = splits.scenes_of(folder, "val")
    for pattern, units in ((r"-\d\.png$", len({n[:-6] for n in names})), (".*", 1)):
        report(folder, pattern)
        results = json.loads((folder / "results.json").read_text())
        found = results["cells"][0]["rows"][1]["sets"]["val"]
        assert found["resampled"] == units < len(set(names))
        assert found["difference"]["mean"] == pytest.approx(3 / 24)
    assert found["interval"] == [found["by_seed"][1], found["by_seed"][0]]  # only seeds are drawn
    assert (
        "scenes by their names without `.*` (not questions)" in (folder / "results.md").read_text()
    )
    with pytest.raises(ConfigError, match=r"--resample='\(' is no regular expression"):
        report(folder, "(")


def test_a_damaged_file_is_named(folder):
    path = folder / protocol.FILE
    path.write_text(path.read_text()[:100])
    with pytest.raises(OutputError, match=r"protocol\.json is damaged .*begin in a new folder"):
        report(folder)


def test_figures_are_drawn_of_the_same(folder):
    written = {path.name for path in report(folder)}
    assert written >= {"results.md", "accuracy_val.png", "accuracy_colors.png", "curves.png"}
    assert "selection_best_layer.png" in written
    for path in (folder / "figures").rglob("*.png"):
        assert f"]({path.relative_to(folder)})" in (folder / "results.md").read_text()


def test_several_fractions_are_drawn_over_each_other(folder, monkeypatch):
    fixed = protocol.read(folder)
    fixed["config"]["compare"]["fractions"] = [0.5, 1.0]
    fixed["splits"]["train"]["0.5"] = fixed["splits"]["train"]["1"]
    monkeypatch.setattr(protocol, "read", lambda folder: fixed)
    for arm in RIGHT:
        shutil.copytree(*(Run("random", f, 0, arm).folder(folder) for f in (1.0, 0.5)))
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))
    report(folder)
    (figure,) = [each for each, path in drawn if path.name == "fractions_val.png"]
    (axes,) = figure.axes
    points = {each.get_label(): each.lines[0].get_xydata().tolist() for each in axes.containers}
    assert set(points) == {"none", "cli"}
    at, values = zip(*points["cli"], strict=True)
    assert values == (pytest.approx(800 / 12), pytest.approx(37.5))
    assert at == pytest.approx((50, 100), rel=0.01)  # beside each other, not on each other
    assert points["none"][0][0] < 50 < points["cli"][0][0]
    text = (folder / "results.md").read_text()
    assert "](figures/random_1/fractions_val.png)" in text


def test_every_arm_is_in_the_legend_of_many(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    losses = {"stage1": [{1: 2.0, 2: 1.0}], "stage2": [{1: 1.0, 2: 0.5}]}
    arms = [plots.Curves(f"arm_{i}", losses, [{2: 50.0}]) for i in range(40)]
    plots.learning_curves(arms, tmp_path / "curves.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [each.label for each in arms]
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == len(arms)
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.y1 <= figure.bbox.height
    assert box.x1 <= figure.bbox.width
    assert all(axes.bbox.width > 200 and axes.bbox.x1 <= box.x0 for axes in figure.axes)


def test_answers_to_other_questions_are_refused(folder):
    path = Run("random", 1.0, 0, "cli").workdir(folder) / "predictions_val.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="does not answer the questions of"):
        summary(folder)


def test_missing_matplotlib_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("cli_jax.analysis.plots.importlib.util.find_spec", lambda name: None)
    for call in (lambda: command.compare({}, tmp_path / "o"), lambda: command.redraw(tmp_path)):
        with pytest.raises(PlotError, match="demo"):
            call()
    assert not (tmp_path / "o").exists()
