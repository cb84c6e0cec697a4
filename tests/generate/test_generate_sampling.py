import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.generate.sampling import Sampling, candidates, choose, request_keys

PROBABILITY = np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32)
LOGITS = jnp.log(jnp.asarray(PROBABILITY))[None] + 3.0  # a constant changes nothing


def allowed(**options):
    kept = candidates(LOGITS, Sampling(temperature=1.0, **options))[0]
    return np.flatnonzero(np.isfinite(kept)).tolist()


def test_everything_is_a_candidate_by_default():
    assert allowed() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (99, [*range(5)])]
)
def test_top_k(k, kept):
    assert allowed(top_k=k) == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, [1]), (0.39, [1]), (0.5, [1, 2]), (0.66, [1, 2, 3]), (0.99, [*range(5)])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
    assert allowed(top_p=p) == kept


def test_top_p_is_taken_of_what_top_k_leaves():
    # Of the two tokens left, 0.4 / 0.65 = 0.615 reaches 0.6 alone; of all five it would not.
    assert allowed(top_k=2, top_p=0.6) == [1]
    assert allowed(top_p=0.6) == [1, 2]


def test_temperature_sharpens_before_top_p():
    # Squared and normalized (temperature 0.5) the most likely token has 0.58 of the mass.
    kept = candidates(LOGITS, Sampling(temperature=0.5, top_p=0.55))[0]
    assert np.flatnonzero(np.isfinite(kept)).tolist() == [1]
    assert allowed(top_p=0.55) == [1, 2]


def test_greedy_takes_the_maximum_and_ignores_the_rest():
    logits = jnp.asarray([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    keys = request_keys(0, jnp.arange(2))
    sampling = Sampling(temperature=0, top_k=1, top_p=0.5)
    assert choose(logits, keys, 0, sampling).tolist() == [1, 0]


def test_keys_depend_on_seed_request_and_step_only():
    logits = jnp.zeros((6, 1000))

    def draw(seed, requests, step):
        keys = request_keys(seed, jnp.asarray(requests))
        return choose(logits[: len(requests)], keys, step, Sampling(temperature=1.0)).tolist()

    whole = draw(0, [0, 1, 2, 3, 4, 5], 0)
    assert len(set(whole)) > 1
    assert draw(0, [4, 2], 0) == [whole[4], whole[2]]
    assert draw(0, [0, 1, 2, 3, 4, 5], 1) != whole
    assert draw(1, [0, 1, 2, 3, 4, 5], 0) != whole


def test_only_candidates_are_drawn():
    keys = request_keys(0, jnp.arange(500))
    logits = jnp.broadcast_to(LOGITS, (500, 5))
    drawn = choose(logits, keys, 0, Sampling(temperature=1.0, top_k=3))
    assert set(np.unique(jax.device_get(drawn))) == {1, 2, 3}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_unusable_values_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**options)
