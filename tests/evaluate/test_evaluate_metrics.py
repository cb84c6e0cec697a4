import pytest

from cli_jax.evaluate.metrics import METRICS, exact_match, normalize, per_character


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Yes. ", "yes"),
        ("yes .", "yes"),
        ("3", "3"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("...", ".."),
        ("the Cat", "the cat"),
        ("1,000", "1,000"),
        ("50%", "50%"),
        ("a  b", "a  b"),
        ("", ""),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("4", "4", 1),
        ("4", " 4.\n", 1),
        ("No", "no", 1),
        ("4", "5", 0),
        ("4", "4 5", 0),
        ("4", "", 0),
    ],
)
def test_exact_match(answer, prediction, score):
    assert exact_match(answer, prediction) == score


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("27009", "27009", 1),
        ("27009", "27109", 4 / 5),
        ("27009", "2700", 4 / 5),
        ("27009", "72009", 3 / 5),
        ("27009", "7009", 1 / 5),  # places count from the left: only the second 0 stays in place
        ("27009", "", 0),
        ("4", "44444", 1 / 5),  # saying more does not help
        ("", "", 1),
        ("Ab.", "aB", 1),
    ],
)
def test_per_character(answer, prediction, score):
    assert per_character(answer, prediction) == pytest.approx(score)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_is_one_for_the_answer_itself_and_zero_for_nothing(metric):
    assert metric("12 apples", "12 apples") == 1
    assert metric("12 apples", "") == 0
