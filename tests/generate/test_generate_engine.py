"""The engine's own logic, on a model whose answers are known in closed form."""

import jax
import numpy as np
import pytest

from cli_jax.batch import empty
from cli_jax.generate.engine import Generator
from cli_jax.generate.sampling import Sampling
from tests.generate.fake_model import VOCAB, FakeModel, greedy, make_params, next_logits

NEVER = VOCAB  # an id that the model cannot produce
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3], [5, 8, 9, 7, 9, 3, 2], [2, 7, 1, 8]]


def make_batch(prompts, rows, length):
    batch = empty(rows=rows, length=length, visual=1, tiles=1, images=1, tile_size=2, patches=1)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        batch["input_ids"][row, :n] = prompt
        batch["segment_ids"][row, :n] = 1
        batch["positions"][row, :n] = np.arange(n)
    batch["input_ids"][batch["segment_ids"] == 0] = 11  # padding may hold any id
    return batch


def make_generator(**kwargs):
    options = {"stop_ids": [NEVER], "pad_id": 0, "max_new_tokens": 12} | kwargs
    return Generator(FakeModel(), make_params(), **options)


def answer_all(generator, prompts, rows, length=9):
    answers = []
    for start in range(0, len(prompts), rows):
        part = prompts[start : start + rows]
        numbers = range(start, start + len(part))
        answers += generator(make_batch(part, rows, length), list(numbers))
    return answers


@pytest.mark.parametrize(("rows", "length"), [(1, 7), (1, 16), (2, 9), (8, 8)])
def test_greedy_equals_the_definition(rows, length):
    answers = answer_all(make_generator(), PROMPTS, rows, length)
    assert [a.ids for a in answers] == [greedy(make_params(), p, 12) for p in PROMPTS]
    assert not any(a.stopped for a in answers)


def test_a_stop_token_ends_its_own_row_only():
    params = make_params()
    full = [greedy(params, p, 12) for p in PROMPTS]
    stop = full[1][4]
    answers = answer_all(make_generator(stop_ids=[NEVER, stop]), PROMPTS, rows=5)
    for answer, tokens in zip(answers, full, strict=True):
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert answer.ids == expected
        assert answer.stopped == (stop in tokens)
    assert answers[1].ids == full[1][: full[1].index(stop)]
    assert any(a.stopped for a in answers)
    assert not all(a.stopped for a in answers)


def test_a_stop_token_in_first_place_gives_an_empty_answer():
    first = greedy(make_params(), PROMPTS[0], 1)[0]
    answer = make_generator(stop_ids=[first])(make_batch(PROMPTS[:1], 1, 4), [0])[0]
    assert (answer.ids, answer.stopped) == ([], True)


def test_a_stop_token_in_last_place_counts_as_stopped():
    tokens = greedy(make_params(), PROMPTS[1], 12)
    last = next(i for i, t in enumerate(tokens) if t not in tokens[:i] and i > 0)
    generator = make_generator(stop_ids=[tokens[last]], max_new_tokens=last + 1)
    answer = generator(make_batch([PROMPTS[1]], 1, 6), [0])[0]
    assert (answer.ids, answer.stopped) == (tokens[:last], True)


def test_one_new_token_needs_no_decode():
    answers = answer_all(make_generator(max_new_tokens=1), PROMPTS, rows=5)
    assert [a.ids for a in answers] == [greedy(make_params(), p, 1) for p in PROMPTS]


def test_decoding_ends_when_every_row_has_stopped():
    """The loop must not run on for rows that hold no prompt: their answers would never stop."""
    params = make_params()
    stop = greedy(params, PROMPTS[0], 3)[2]
    calls = []

    class Counting(FakeModel):
        def _decode(self, params, tokens, positions, slot, valid, cache):
            jax.debug.callback(lambda t: calls.append(np.asarray(t)), tokens, ordered=True)
            return super()._decode(params, tokens, positions, slot, valid, cache)

    generator = Generator(Counting(), params, stop_ids=[stop], pad_id=0, max_new_tokens=12)
    assert generator(make_batch(PROMPTS[:1], 4, 5), [0])[0].stopped
    assert len(calls) == greedy(params, PROMPTS[0], 12).index(stop)


def test_left_over_rows_are_dropped_and_change_nothing():
    generator = make_generator()
    alone = generator(make_batch(PROMPTS[:2], 2, 9), [0, 1])
    padded = generator(make_batch(PROMPTS[:2], 6, 9), [0, 1])
    assert padded == alone
    assert len(padded) == 2


def test_every_new_shape_compiles_once():
    generator = make_generator()
    for _ in range(2):
        for rows, length in [(1, 7), (2, 7), (2, 9)]:
            generator(make_batch(PROMPTS[:1], rows, length), [0])
    assert generator.compilations == 3


def test_sampling_does_not_depend_on_the_batch():
    sampling = Sampling(temperature=6.0, seed=5)
    one = answer_all(make_generator(sampling=sampling), PROMPTS, rows=1)
    five = answer_all(make_generator(sampling=sampling), PROMPTS, rows=5)
    three = answer_all(make_generator(sampling=sampling), PROMPTS, rows=3)
    other_seed = answer_all(make_generator(sampling=Sampling(6.0, seed=6)), PROMPTS, rows=5)
    assert one == five == three
    assert one != other_seed
    assert [a.ids for a in one] != [greedy(make_params(), p, 12) for p in PROMPTS]


def test_sampled_tokens_follow_the_models_distribution():
    rows = 4000
    generator = make_generator(sampling=Sampling(temperature=8.0), max_new_tokens=2)
    answers = generator(make_batch([PROMPTS[0]] * rows, rows, 4), list(range(rows)))
    params = make_params()
    first = np.array([a.ids[0] for a in answers])
    check_frequencies(first, next_logits(params, PROMPTS[0]) / 8)
    commonest = np.bincount(first).argmax()
    second = np.array([a.ids[1] for a in answers if a.ids[0] == commonest])
    check_frequencies(second, next_logits(params, [*PROMPTS[0], commonest]) / 8)


def check_frequencies(drawn, logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    found = np.bincount(drawn, minlength=len(p)) / len(drawn)
    error = np.abs(found - p) / np.sqrt(p * (1 - p) / len(drawn) + 1e-9)
    assert error.max() < 4.5  # standard errors, 23 tokens
    assert (p > 0.05).sum() >= 2  # else the check would say nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop_ids": []}, "stop_ids"),
    ],
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_generator(**options)


def test_rows_that_are_not_single_right_padded_prompts_are_refused():
    generator = make_generator()
    packed = make_batch([[1, 2, 3, 4]], 1, 6)
    packed["segment_ids"][0, 2:4] = 2
    with pytest.raises(ValueError, match="right-padded"):
        generator(packed, [0])
    left = make_batch([[1, 2]], 1, 4)
    left["segment_ids"][:] = left["segment_ids"][:, ::-1]
    with pytest.raises(ValueError, match="right-padded"):
        generator(left, [0])
    with pytest.raises(ValueError, match="first 1 rows"):
        generator(make_batch([[1], [2]], 2, 4), [0])
    with pytest.raises(ValueError, match="3 requests"):
        generator(make_batch([[1], [2]], 2, 4), [0, 1, 2])
