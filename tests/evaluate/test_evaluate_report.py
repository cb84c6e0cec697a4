import json

import pytest

from cli_jax.evaluate.report import (
    Prediction,
    summarize,
    table,
    versions,
    write_predictions,
)


def row(category, question, answer, prediction, error=""):
    return Prediction("id", category, question, answer, prediction, error)


ROWS = [
    row("digit", "first?", "1", "1"),
    row("digit", "first?", "1", "2"),
    row("digit", "second?", "2", "2."),
    row("digit", "second?", "3", "2"),
    row("reading", "all?", "12", "13"),
    row("reading", "all?", "34", "", error="broken picture"),
]


def test_accuracies_by_hand():
    summary = summarize(ROWS)
    assert summary["overall"]["n"] == 6
    assert summary["overall"]["exact_match"] == pytest.approx(2 / 6)
    assert summary["overall"]["per_character"] == pytest.approx(2.5 / 6)
    assert list(summary["categories"]) == ["digit", "reading"]
    digit, reading = summary["categories"]["digit"], summary["categories"]["reading"]
    assert (digit["n"], digit["exact_match"]) == (4, 0.5)
    assert (reading["n"], reading["exact_match"], reading["per_character"]) == (2, 0, 0.25)


def test_chance_levels_by_hand():
    summary = summarize(ROWS)
    digit = summary["categories"]["digit"]
    assert digit["chance_answer"] == "1"
    assert digit["chance"]["exact_match"] == pytest.approx(2 / 4)
    assert digit["chance_per_question"]["exact_match"] == pytest.approx(3 / 4)
    assert digit["distinct_questions"] == 2
    overall = summary["overall"]
    assert overall["chance"]["exact_match"] == pytest.approx(2 / 6)
    # "1" is the first character of "12" too, out of two.
    assert overall["chance"]["per_character"] == pytest.approx(2.5 / 6)
    assert overall["chance_per_question"]["exact_match"] == pytest.approx(4 / 6)


def test_the_commonest_answer_does_not_depend_on_the_order_of_rows():
    rows = [row("a", "q", answer, "") for answer in ["7", "3", "5"]]
    assert summarize(rows)["overall"]["chance_answer"] == "3"
    assert summarize(rows[::-1])["overall"]["chance_answer"] == "3"


def test_spellings_that_score_alike_are_one_answer():
    rows = [row("a", "q", answer, "") for answer in ["Yes", "yes", "Yes.", "No", "No"]]
    overall = summarize(rows)["overall"]
    assert overall["chance_answer"] == "Yes"
    assert overall["chance"]["exact_match"] == pytest.approx(3 / 5)
    assert overall["chance_per_question"]["exact_match"] == pytest.approx(3 / 5)


def test_a_row_that_could_not_be_asked_is_wrong_even_if_nothing_is_the_answer():
    bad = row("a", "q", "", "", error="no answer")
    assert not bad.correct
    assert summarize([bad])["overall"]["exact_match"] == 0


def test_predictions_are_one_json_object_per_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [row("ä", "q\n2", "1", "1."), row("b", "q", "2", "", "broken")])
    first, second = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert first == {
        "id": "id",
        "category": "ä",
        "question": "q\n2",
        "answer": "1",
        "prediction": "1.",
        "error": "",
        "correct": True,
    }
    assert (second["correct"], second["error"]) == (False, "broken")


def test_the_table_shows_every_category_and_the_whole():
    lines = table(summarize(ROWS)).splitlines()
    assert [line.split()[0] for line in lines] == ["category", "digit", "reading", "overall"]
    assert "33.3%" in lines[-1]


def test_versions_name_python_and_jax():
    import jax

    found = versions()
    assert found["jax"] == jax.__version__
    assert found["python"].startswith("3.")
