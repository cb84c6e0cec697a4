import json
import tracemalloc

import numpy as np
import pytest

from cli_jax.evaluate.prompts import (
    THREADS,
    load_prompts,
    open_pictures,
    prompt_spec,
    read_questions,
)
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def spec(tmp_path):
    experiment = small.make_experiment(tmp_path)
    return prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), new_tokens=6)


def decoded(sample, spec):
    """The prompt's text; a visual position is id 0, a special token that decodes to nothing."""
    return spec.tokenizer.decode(sample.ids)


def test_a_row_asks_for_its_last_answer(tmp_path, spec):
    turns = [human("<image>\nfirst?"), gpt("one"), human("second?"), gpt("two")]
    row = {
        "id": 7,
        "category": "late",
        "image": small.save_picture(tmp_path, "p.png", (9, 9), seed=0),
        "conversations": turns,
    }
    [question] = read_questions(small.save_rows(tmp_path, [row]))
    assert (question.id, question.category) == ("7", "late")
    assert (question.text, question.answer, question.images) == ("second?", "two", ("p.png",))
    [(number, sample)] = load_prompts([question], str(tmp_path), spec)
    text = decoded(sample, spec)
    assert number == 0
    assert text.endswith("second?\nassistant\n")
    assert "one" in text
    assert "two" not in text


def test_missing_fields_have_defaults(tmp_path):
    row = {"conversations": [human("<image> \n q? "), gpt(" a\n")]}
    [question] = read_questions(small.save_rows(tmp_path, [row]))
    assert (question.id, question.category, question.images) == ("0", "all", ())
    assert (question.text, question.answer) == ("q?", "a")


def test_questions_are_read_one_by_one_and_not_kept(tmp_path):
    """Analyses walk through files of any size."""
    path = tmp_path / "many.jsonl"
    row = {"conversations": [human("q" * 5000), gpt("a")]}
    path.write_text((json.dumps(row) + "\n") * 1000)
    questions = read_questions(path)
    tracemalloc.start()
    assert sum(len(question.text) for question in questions) == 5_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000
    assert questions[-1].id == "999"
    assert [question.id for question in questions[3:5]] == ["3", "4"]
    with pytest.raises(IndexError):
        questions[1000]


def test_limit_takes_the_first_rows(tmp_path):
    path = small.save_questions(tmp_path, 5)
    assert [q.id for q in read_questions(path, 2)] == ["q0", "q1"]
    assert len(read_questions(path, 99)) == len(read_questions(path)) == 5


BAD = {
    "no answer": {"conversations": [human("q")]},
    "empty answer": {"conversations": [human("q"), gpt(" ")]},
    "answer only": {"conversations": [gpt("a")]},
    "two answers only": {"conversations": [gpt("a"), gpt("b")]},
    "no turns": {"conversations": []},
    "no conversation": {},
    "unknown role": {"conversations": [{"from": "me", "value": "q"}, gpt("a")]},
    "not a row": ["q", "a"],
    "missing picture": small.question(0, "nowhere.png"),
    "picture outside the root": small.question(0, "../p.png"),
    "odd image field": {**small.question(0), "image": 5},
    "odd image list": {**small.question(0), "image": [5, None]},
    "slots without pictures": {**small.question(0, "p.png"), "image": ["p.png", "p.png"]},
    "too long": {"conversations": [human("q" * 2000), gpt("a")]},
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_a_bad_row_gives_a_reason_and_stops_nobody(tmp_path, spec, row):
    small.save_picture(tmp_path, "p.png", (9, 9), seed=0)
    good = small.question(1, "p.png")
    questions = read_questions(small.save_rows(tmp_path, [good, row, good]))
    first, (number, reason), last = load_prompts(questions, str(tmp_path), spec)
    assert number == 1
    assert isinstance(reason, str)
    assert reason.split(":")[0] in {"RowError", "ConversationError", "ImageError", "TooLong"}
    assert np.array_equal(first[1].ids, last[1].ids)


def test_prompts_may_be_longer_than_training_rows(tmp_path, spec):
    """The rows of training are packed bins; what can be asked is what the decoder can read."""
    row = {"conversations": [human("q" * 300), gpt("a")]}
    [(_, sample)] = load_prompts(read_questions(small.save_rows(tmp_path, [row])), "", spec)
    assert len(sample.ids) > 300


def test_many_prompts_stay_in_order(tmp_path, spec):
    questions = read_questions(small.save_questions(tmp_path, 30))
    found = list(load_prompts(questions, str(tmp_path), spec))
    assert [number for number, _ in found] == list(range(30))
    assert [sample.id for _, sample in found] == [q.id for q in questions]


def test_few_prompts_are_held(tmp_path, spec):
    """The pictures of a large file must not all be decoded before the first is asked about."""
    taken = []

    class Watched(list):
        def __iter__(self):
            for question in super().__iter__():
                taken.append(question)
                yield question

    questions = Watched(read_questions(small.save_questions(tmp_path, 40)))
    stream = load_prompts(questions, str(tmp_path), spec)
    next(stream)
    assert len(taken) == 2 * THREADS + 1
    assert len(list(stream)) == 39


def test_blank_prompts_equal_prompts_with_gray_files(tmp_path, spec):
    path = small.save_mixed_questions(tmp_path)
    questions = read_questions(path)
    blank = list(load_prompts(questions, str(tmp_path), spec, blank=True))
    seen = list(load_prompts(questions, str(tmp_path), spec))
    for question in questions:
        for i, name in enumerate(question.images):
            [picture] = [open_pictures(question, str(tmp_path), spec)[i]]
            small.save_picture(tmp_path, name, picture.size)
    gray = list(load_prompts(questions, str(tmp_path), spec))
    assert any(len(sample.tiles) > 1 for _, sample in gray)
    for (_, a), (_, b), (_, c) in zip(blank, gray, seen, strict=True):
        for field, value in vars(a).items():
            assert np.array_equal(value, getattr(b, field)), field
        assert len(c.tiles) == 0 or not np.array_equal(a.tiles, c.tiles)
