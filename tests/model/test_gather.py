"""The gather plan and its inverse against dense matrices, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_jax.model.gather import apply_plan, place, take_or_zero

B, N, P, L, D = 2, 12, 9, 14, 3
SEEDS = st.integers(0, 2**32 - 1)


def random_plan(rng, most=4):
    """A plan that keeps the contract of batch.py, with its inverse and its matrix [B, P, N].

    No patch is read more than `most` times.
    """
    index = rng.integers(0, N, (B, P, 4)).astype(np.int32)
    weight = np.zeros((B, P, 4), np.float32)
    inverse = np.full((B, N, most), P * 4, np.int32)
    matrix = np.zeros((B, P, N))
    for b in range(B):
        reads = np.zeros(N, int)
        for p in rng.permutation(P):
            free = rng.permutation(np.flatnonzero(reads < most))[: rng.integers(0, 5)]
            shares = rng.dirichlet(np.ones(len(free))) if len(free) else []
            for c, patch, share in zip(rng.permutation(4), free, shares, strict=False):
                index[b, p, c], weight[b, p, c] = patch, share
                inverse[b, patch, reads[patch]] = p * 4 + c
                matrix[b, p, patch] = weight[b, p, c]
                reads[patch] += 1
    return index, weight, inverse, matrix


def random_placement(rng):
    """A one-to-one map of some of N slots to some of L positions, both ways, and its matrix."""
    index, inverse = np.full((B, L), N, np.int32), np.full((B, N), L, np.int32)
    matrix = np.zeros((B, L, N))
    for b in range(B):
        count = rng.integers(0, N + 1)
        for n, r in zip(rng.permutation(N)[:count], rng.permutation(L)[:count], strict=True):
            index[b, r], inverse[b, n], matrix[b, r, n] = n, r, 1
    return index, inverse, matrix


def both_ways(f):
    """Compiled (x, dy, *maps) -> f(x, *maps) and its pullback of dy."""

    @jax.jit
    def run(x, dy, *maps):
        y, pull = jax.vjp(lambda x: f(x, *maps), x)
        return y, pull(dy)[0]

    return run


PLAN, PLACE = both_ways(apply_plan), both_ways(place)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([2, 4, 7]))
def test_plan_is_its_matrix(seed, most):
    rng = np.random.default_rng(seed)
    index, weight, inverse, matrix = random_plan(rng, most)
    x, dy = rng.normal(size=(B, N, D)), rng.normal(size=(B, P, D))
    args = np.float32(x), np.float32(dy), index, weight, inverse
    y, dx = PLAN(*args)
    np.testing.assert_allclose(y, matrix @ x, rtol=0, atol=1e-6)
    np.testing.assert_allclose(dx, matrix.swapaxes(1, 2) @ dy, rtol=0, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, PLAN(*args), (y, dx))  # the same bits again


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_placement_is_its_matrix(seed):
    rng = np.random.default_rng(seed)
    index, inverse, matrix = random_placement(rng)
    x, dy = np.float32(rng.normal(size=(B, N, D))), np.float32(rng.normal(size=(B, L, D)))
    y, dx = PLACE(x, dy, index, inverse)
    np.testing.assert_array_equal(y, np.float32(matrix @ x))
    np.testing.assert_array_equal(dx, np.float32(matrix.swapaxes(1, 2) @ dy))


@pytest.mark.parametrize("name", ["plan", "place"])
def test_backward_is_a_gather(name):
    """No scatter in the traced nor in the compiled program."""
    rng = np.random.default_rng(0)
    if name == "plan":
        run, maps, out = PLAN, random_plan(rng)[:3], (B, P, D)
    else:
        run, maps, out = PLACE, random_placement(rng)[:2], (B, L, D)
    args = jnp.ones((B, N, D)), jnp.ones(out), *maps
    traced, compiled = str(jax.make_jaxpr(run)(*args)), run.lower(*args).compile().as_text()
    assert "gather" in traced
    assert "scatter" not in traced
    assert "scatter" not in compiled


def test_plan_sums_in_float32():
    """Four bfloat16 corners are summed before the one rounding to bfloat16."""
    rng = np.random.default_rng(0)
    index, weight, inverse, matrix = random_plan(rng)
    x = jnp.asarray(rng.normal(size=(B, N, D)), jnp.bfloat16)
    y = apply_plan(x, index, weight, inverse)
    assert y.dtype == jnp.bfloat16
    exact = matrix @ np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=0)


def test_take_past_the_end_is_zero():
    x = jnp.arange(1.0, 7.0).reshape(1, 3, 2)
    taken = take_or_zero(x, jnp.array([[2, 3, 0]]))
    np.testing.assert_array_equal(taken, [[[5, 6], [0, 0], [1, 2]]])
