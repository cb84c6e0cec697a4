import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cli_jax.data import DataError
from cli_jax.evaluate.run import evaluate
from cli_jax.generate.engine import Generator
from cli_jax.generate.sampling import Sampling
from cli_jax.output import OutputError
from tests.evaluate import eval_small as small


class Setting:
    """A model, seven rows of which two cannot be asked, and one whole evaluation of them."""

    def __init__(self, folder):
        self.folder = folder
        self.experiment = small.make_experiment(folder)
        self.model, self.params = small.make_model(self.experiment)
        rows = json.loads(small.save_questions(folder, 5).read_text())
        rows.insert(2, small.question(90, "nowhere.png"))
        rows.append(small.question(91, conversations=[]))
        self.rows = rows
        self.data = small.save_rows(folder, rows, "asked.json")
        self.results = self.evaluate("whole")

    def evaluate(self, output, **options):
        arguments = {"image_root": self.folder, "step": 3, **options}
        data = arguments.pop("data", self.data)
        return evaluate(
            self.model,
            self.params,
            self.experiment,
            data,
            arguments.pop("image_root"),
            self.folder / output,
            **arguments,
        )

    def predictions(self, output, name="predictions.jsonl"):
        return [json.loads(line) for line in (self.folder / output / name).open(encoding="utf-8")]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("evaluate"))


def test_results_say_what_was_run(setting):
    results = setting.results
    assert json.loads((setting.folder / "whole" / "results.json").read_text()) == results
    assert results["experiment"] == "small"
    assert (results["fusion"], results["step"]) == ("cli", 3)
    assert (results["data"], results["blank_images"]) == (str(setting.data), False)
    assert results["metrics"] == ["exact_match", "per_character"]
    assert results["generation"]["max_new_tokens"] == 6
    assert results["generation"]["temperature"] == 0
    assert results["generation"]["compilations"] == 1
    assert results["seconds"] > 0
    assert "jax" in results["versions"]


def test_every_row_is_counted_and_bad_ones_are_listed(setting):
    results = setting.results
    assert results["overall"]["n"] == 7
    assert {name: c["n"] for name, c in results["categories"].items()} == {"few": 4, "many": 3}
    assert [bad["id"] for bad in results["bad_rows"]] == ["q90", "q91"]
    assert "no such file" in results["bad_rows"][0]["reason"]
    assert "empty" in results["bad_rows"][1]["reason"]


def test_predictions_stand_in_the_order_of_the_file(setting):
    found = setting.predictions("whole")
    assert [p["id"] for p in found] == [row["id"] for row in setting.rows]
    assert [p["answer"] for p in found] == ["0", "1", "90", "2", "3", "4", ""]
    assert [bool(p["error"]) for p in found] == [p["id"] in ("q90", "q91") for p in found]
    assert len({p["prediction"] for p in found}) > 2
    correct = sum(p["correct"] for p in found) / len(found)
    assert setting.results["overall"]["exact_match"] == pytest.approx(correct)


def test_right_answers_are_scored_as_right_in_any_batch_size(setting):
    """The model's own answers as the answers: what is asked is not changed by them."""
    predicted = {p["id"]: p["prediction"] for p in setting.predictions("whole")}
    rows = [json.loads(json.dumps(row)) for row in setting.rows if row["id"] not in ("q90", "q91")]
    for row in rows[1:]:
        row["conversations"][1]["value"] = predicted[row["id"]].upper() + "."
    data = small.save_rows(setting.folder, rows, "answered.json")
    results = setting.evaluate("answered", data=data, image_root="", batch_size=1)
    assert results["generation"]["batch_size"] == 1
    found = setting.predictions("answered")
    assert {p["id"]: p["prediction"] for p in found}.items() <= predicted.items()
    assert [p["correct"] for p in found] == [False] + [True] * 4
    assert results["overall"]["exact_match"] == pytest.approx(4 / 5)


def test_blank_images_are_what_the_model_sees_and_the_sheet_shows(setting):
    results = setting.evaluate("blank", blank=True, name="results_blank.json")
    assert results["blank_images"] is True
    names = sorted(path.name for path in (setting.folder / "blank").iterdir())
    assert names == ["examples_blank.png", "predictions_blank.jsonl", "results_blank.json"]
    blank = setting.predictions("blank", "predictions_blank.jsonl")
    seen = setting.predictions("whole")
    assert [p["error"] for p in blank] == [p["error"] for p in seen]
    assert [p["prediction"] for p in blank] != [p["prediction"] for p in seen]
    corner = np.asarray(Image.open(setting.folder / "blank" / "examples_blank.png"))[9:60, 9:60]
    assert (corner == 127).all()


def test_options_of_the_call_go_before_the_config(setting):
    sampling = Sampling(temperature=2.0, seed=1)
    results = setting.evaluate("short", limit=2, max_new_tokens=3, sampling=sampling)
    assert (results["overall"]["n"], results["limit"]) == (2, 2)
    options = results["generation"]
    assert (options["max_new_tokens"], options["temperature"], options["seed"]) == (3, 2.0, 1)
    found, greedy = setting.predictions("short"), setting.predictions("whole")
    assert len(found) == 2
    assert [p["prediction"] for p in found] != [p["prediction"][:3] for p in greedy[:2]]


def test_answers_that_were_cut_off_are_counted(setting, monkeypatch):
    honest, stopped = Generator.__call__, []

    def every_third_stops(self, batch, requests):
        completions = honest(self, batch, requests)
        for i, completion in enumerate(completions):
            stopped.append(len(stopped) % 3 == 0)
            completions[i] = dataclasses.replace(completion, stopped=stopped[-1])
        return completions

    monkeypatch.setattr(Generator, "__call__", every_third_stops)
    results = setting.evaluate("cut")
    assert stopped == [True, False, False, True, False]
    assert results["cut_off"] == 3


def test_the_contact_sheet_shows_every_row(setting):
    with Image.open(setting.folder / "whole" / "examples.png") as sheet:
        assert sheet.width == 6 * 260
        assert sheet.height > 260


def test_an_older_result_does_not_survive_a_failed_run(setting):
    folder = setting.folder / "stale"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    with pytest.raises(DataError):
        setting.evaluate("stale", data=setting.folder / "absent.json")
    assert not (folder / "results.json").exists()


def test_the_data_is_never_overwritten(setting):
    before = setting.data.read_bytes()
    with pytest.raises(OutputError, match="is the data itself"):
        setting.evaluate(".", name="asked.json")
    assert setting.data.read_bytes() == before


def test_an_unwritable_place_is_refused_before_any_work(setting):
    (setting.folder / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        setting.evaluate("file/below")
