import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.batch import IGNORE
from cli_jax.train.loss import loss_sums, next_token_targets, target_weights

VOCAB, WIDTH = 11, 6


def make(rows: int = 3, length: int = 13, seed: int = 0):
    """Hidden states, labels and segments: samples of 5, 4 and 2 tokens, then padding."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, length, WIDTH)).astype(np.float32)
    segments = np.zeros((rows, length), np.int32)
    segments[:, :5], segments[:, 5:9], segments[:, 9:11] = 1, 2, 3
    labels = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = IGNORE
    return hidden, labels, segments


def head(seed: int = 1):
    return np.random.default_rng(seed).normal(size=(WIDTH, VOCAB)).astype(np.float32)


def run(hidden, labels, segments, kernel, **options):
    options = {"average": "tokens"} | options
    return loss_sums(
        jnp.asarray(hidden),
        jnp.asarray(labels),
        jnp.asarray(segments),
        lambda x: (x @ kernel).astype(jnp.float32),
        **options,
    )


def by_hand(hidden, labels, segments, kernel, average: str) -> float:
    """The mean loss, sample by sample, with loops."""
    means, losses = [], []
    for row in range(len(labels)):
        for sample in range(1, segments.max() + 1):
            inside = np.flatnonzero(segments[row] == sample)
            mine = []
            for here, following in itertools.pairwise(inside):
                if labels[row, following] == IGNORE:
                    continue
                logits = hidden[row, here].astype(np.float64) @ kernel
                mine.append(np.log(np.exp(logits).sum()) - logits[labels[row, following]])
            losses += mine
            if mine:
                means.append(np.mean(mine))
    return float(np.mean(losses if average == "tokens" else means))


@pytest.mark.parametrize("average", ["tokens", "samples"])
def test_the_mean_is_that_of_plain_loops(average):
    hidden, labels, segments = make()
    sums = run(hidden, labels, segments, head(), average=average)
    expected = by_hand(hidden, labels, segments, head(), average)
    assert float(sums.loss / sums.weight) == pytest.approx(expected, rel=1e-5)
    assert by_hand(*make(), head(), "tokens") != pytest.approx(
        by_hand(*make(), head(), "samples"), rel=1e-3
    )


def test_loss_never_crosses_samples_and_first_tokens_carry_none():
    _, labels, segments = make()
    labels[:] = np.arange(labels.shape[1])
    targets = np.asarray(next_token_targets(jnp.asarray(labels), jnp.asarray(segments)))
    assert targets[0].tolist() == [1, 2, 3, 4, -100, 6, 7, 8, -100, 10, -100, -100, -100]
    # The labels of first tokens and of padding change nothing.
    changed = labels.copy()
    changed[:, [0, 5, 9, 11, 12]] = 7
    again = next_token_targets(jnp.asarray(changed), jnp.asarray(segments))
    np.testing.assert_array_equal(np.asarray(again), targets)


def test_a_full_row_does_not_wrap_around():
    labels = np.arange(6, dtype=np.int32)[None]
    targets = next_token_targets(jnp.asarray(labels), jnp.ones((1, 6), jnp.int32))
    assert np.asarray(targets)[0].tolist() == [1, 2, 3, 4, 5, IGNORE]


def test_sample_weights_sum_to_the_number_of_samples_with_labels():
    _, labels, segments = make()
    labels[0, :5] = IGNORE  # one sample of nine has no label
    targets = next_token_targets(jnp.asarray(labels), jnp.asarray(segments))
    weights = np.asarray(target_weights(targets, jnp.asarray(segments), "samples"))
    for row in range(3):
        for sample in (1, 2, 3):
            inside = segments[row] == sample
            has_any = (np.asarray(targets)[row, inside] != IGNORE).any()
            assert weights[row, inside].sum() == pytest.approx(float(has_any))


@pytest.mark.parametrize("average", ["tokens", "samples"])
@pytest.mark.parametrize("chunk", [1, 4, 13, 20])
def test_chunks_change_neither_the_loss_nor_its_gradients(average, chunk):
    hidden, labels, segments = make()

    def loss(hidden, kernel, chunk):
        sums = run(hidden, labels, segments, kernel, average=average, chunk=chunk)
        return sums.loss / sums.weight, sums

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, whole), whole_grads = grad(hidden, jnp.asarray(head()), 0)
    (_, pieces), pieces_grads = grad(hidden, jnp.asarray(head()), chunk)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    for a, b in zip(whole_grads, pieces_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert float(whole.correct) == float(pieces.correct)


def test_the_logits_of_a_whole_row_never_exist_when_chunked():
    hidden, labels, segments = make(rows=2, length=64)

    def gradient(chunk):
        loss = lambda h, k: run(h, labels, segments, k, chunk=chunk).loss  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, jnp.asarray(head())))

    assert f"f32[2,64,{VOCAB}]" in gradient(0)
    chunked = gradient(16)
    assert f"f32[2,64,{VOCAB}]" not in chunked
    assert f"f32[4,2,16,{VOCAB}]" not in chunked  # nor stacked for the backward pass
    assert f"f32[2,16,{VOCAB}]" in chunked


def test_correct_counts_greedy_guesses_of_labeled_tokens():
    hidden, labels, segments = make()
    kernel = head()
    sums = run(hidden, labels, segments, kernel)
    targets = np.asarray(next_token_targets(jnp.asarray(labels), jnp.asarray(segments)))
    guesses = (hidden @ kernel).argmax(-1)
    assert float(sums.correct) == ((guesses == targets) & (targets != IGNORE)).sum()
    assert float(sums.labeled) == (targets != IGNORE).sum()
    assert float(sums.labeled) == float(sums.weight)


def test_large_logits_do_not_overflow():
    hidden, labels, segments = make()
    sums = run(hidden * 1e4, labels, segments, head())
    assert np.isfinite(float(sums.loss))
