"""Stacks of layers with visits, against a plain loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from cli_jax.model.remat import POLICIES, layer_input, rematerialize
from cli_jax.model.stack import group_visits, run

D = 8


@st.composite
def stacks(draw):
    """(layers held, layers run, visit points), the last point possibly behind the last layer."""
    held = draw(st.integers(1, 7))
    stop = draw(st.integers(1, held))
    points = draw(st.lists(st.integers(0, stop), unique=True, max_size=stop + 1))
    return held, stop, tuple(sorted(points))


def layer(h, w):
    h = layer_input(h)
    return h + jnp.tanh(h @ w), None


def visit(h, x):
    return h + x, jnp.sum(h, axis=-1)


def values(held, points, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (3, D), (held, D, D), (len(points), D)
    return [jnp.asarray(rng.normal(size=shape) * 0.5, dtype) for shape in shapes]


def looped(h, weights, visits, stop, points):
    """The definition: layer after layer, each visit right before its layer."""
    outs = []
    for i in range(stop + 1):
        if i in points:
            h, out = visit(h, visits[points.index(i)])
            outs.append(out)
        if i < stop:
            h, _ = layer(h, weights[i])
    return h, outs


@settings(max_examples=25, deadline=None)
@given(stacks(), st.booleans())
def test_equals_a_loop(stack, unroll):
    held, stop, points = stack
    h, weights, visits = values(held, points)

    def scanned(h, weights, visits):
        return run(
            layer, h, weights, stop=stop, unroll=unroll, points=points, visit=visit, visits=visits
        )

    h_out, outs = jax.jit(scanned)(h, weights, visits)
    expected, expected_outs = looped(h, weights, visits, stop, points)
    np.testing.assert_allclose(h_out, expected, rtol=1e-5, atol=1e-5)
    if points:
        np.testing.assert_allclose(outs, expected_outs, rtol=1e-5, atol=1e-5)
    else:
        assert outs is None


@settings(max_examples=200, deadline=None)
@given(stacks().filter(lambda stack: stack[2]))
def test_groups_cover_the_layers(stack):
    _, stop, points = stack
    groups = group_visits(points, stop)
    starts = [start + i * size for start, size, count in groups for i in range(count)]
    assert tuple(starts) == points
    ends = [start + size * count for start, size, count in groups]
    assert ends == [start for start, _, _ in groups[1:]] + [stop]
    sizes = [size for _, size, _ in groups]
    assert all(a != b for a, b in itertools.pairwise(sizes))  # as few groups as there can be


def test_equal_spacing_is_one_group():
    assert len(group_visits((1, 4, 7), 10)) == 1


@pytest.mark.parametrize("points", [(2, 1), (1, 1), (0, 5)])
def test_bad_points_are_refused(points):
    with pytest.raises(ValueError, match="must ascend and not pass layer 4"):
        group_visits(points, 4)


POINTS = (1, 2, 4)


def gradients(policy):
    """Value and gradients of a scalar of everything that a stack returns."""
    args = values(5, POINTS)

    def scalar(h, weights, visits):
        h, outs = run(
            layer,
            h,
            weights,
            stop=5,
            unroll=False,
            points=POINTS,
            visit=visit,
            visits=visits,
            remat=policy,
        )
        return jnp.sum(h**2) + jnp.sum(jnp.sin(outs))

    return jax.jit(jax.value_and_grad(scalar, (0, 1, 2)))(*args)


def test_remat_policies_change_no_number():
    def scalar(h, weights, visits):
        h, outs = looped(h, weights, visits, 5, POINTS)
        return jnp.sum(h**2) + jnp.sum(jnp.sin(jnp.array(outs)))

    expected = jax.jit(jax.value_and_grad(scalar, (0, 1, 2)))(*values(5, POINTS))
    for policy in ("none", *POLICIES):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            gradients(policy),
            expected,
        )


def test_full_remat_recomputes():
    h, weights, _ = values(1, ())

    def tanhs(policy):
        def total(h, weights):
            return jnp.sum(rematerialize(layer, policy)(h, weights[0])[0])

        return str(jax.make_jaxpr(jax.grad(total))(h, weights)).count("tanh")

    assert tanhs("full") == tanhs("none") + 1


def test_a_step_outside_of_loops_is_computed_again_too():
    """Layer 0 behind the only visit is in no loop, layers 1 to 3 are: two steps each way."""
    h, weights, visits = values(4, (0,))

    def total(weights):
        how = {"points": (0,), "visit": visit, "visits": visits, "remat": "full"}
        return jnp.sum(run(layer, h, weights, stop=4, unroll=False, **how)[0])

    program = jax.jit(jax.grad(total)).lower(weights).compile().as_text()
    assert program.count(" tanh(") == 4  # 3 where the compiler found the first one again


def test_numbers_do_not_depend_on_the_cut():
    """Bit for bit in bfloat16, where XLA would keep more precision inside what it fuses."""
    h, weights, _ = values(5, (), jnp.bfloat16)

    def norm_layer(h, w):
        h32 = h.astype(jnp.float32)
        x = h32 * jax.lax.rsqrt(jnp.mean(h32**2, -1, keepdims=True) + 1e-6)
        return h + x.astype(h.dtype) @ w, None

    def result(points, unroll):
        def scanned(h, weights):
            return run(
                norm_layer,
                h,
                weights,
                stop=5,
                unroll=unroll,
                points=points,
                visit=lambda h, _: (h + 0 * h, None),
            )[0]

        return np.asarray(jax.jit(scanned)(h, weights).astype(jnp.float32))

    expected = result((), False)
    for points in [(0,), (1, 2, 4)]:
        for unroll in (False, True):
            np.testing.assert_array_equal(result(points, unroll), expected)


def scans(jaxpr):
    """Every scan of a traced program, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner)


def total(h, weights, visits, visit, **settings):
    """The sum of what nine layers make, scanned and visited before layers 0, 3 and 6."""
    points = (0, 3, 6)
    shape = {"stop": 9, "unroll": False, "points": points}
    return jnp.sum(run(layer, h, weights, visit=visit, visits=visits, **shape, **settings)[0])


def test_layers_between_visits_never_see_what_visits_use():
    """Forward and backward: the scans over plain layers take and give no array of the visits."""
    bank = jnp.ones((6, 3, D))
    h, weights, visits = values(9, (0, 3, 6))

    def scalar(h, weights, visits, bank):
        return total(h, weights, visits, lambda h, x: (h + jnp.sum(bank * x, 0), None))

    traced = jax.make_jaxpr(jax.grad(scalar, (0, 1, 2, 3)))(h, weights, visits, bank)
    plain, visiting = [], []
    for scan in scans(traced.jaxpr):
        shapes = [v.aval.shape for v in (*scan.invars, *scan.outvars)]
        (visiting if bank.shape in shapes else plain).append(scan.params["length"])
    assert len(plain) >= 2  # two of the three layers behind each visit, forward and backward
    assert set(plain) == {2}
    assert len(visiting) >= 2  # the three visits, each with the layer behind it
    assert set(visiting) == {3}


def test_a_visit_keeps_nothing_beside_its_layer():
    """Full rematerialization saves the carry before the visit, not also the one behind it."""
    h, weights, visits = values(9, (0, 3, 6))

    def scalar(h, weights, visits):
        return total(h, weights, visits, lambda h, x: (jnp.sin(h) + x, None), remat="full")

    traced = jax.make_jaxpr(jax.grad(scalar))(h, weights, visits)
    saved = [v.aval.shape for scan in scans(traced.jaxpr) for v in scan.outvars]
    assert (3, *h.shape) in saved  # before the visits
    assert (3, 2, *h.shape) in saved  # before the other layers
    assert saved.count((3, *h.shape)) == 1


@pytest.mark.parametrize("points", [(), (0, 1, 2, 3)], ids=["plain", "visited"])
def test_unrolled_layers_are_computed_again_too(points):
    """Not in a loop, a layer computed again for the backward pass is one that XLA would merge."""
    h, weights, visits = values(4, points)

    def tanhs(policy):
        def total(weights):
            how = {"points": points, "visit": visit, "visits": visits} if points else {}
            out, _ = run(layer, h, weights, stop=4, unroll=True, remat=policy, **how)
            return jnp.sum(out)

        return jax.jit(jax.grad(total)).lower(weights).compile().as_text().count(" tanh(")

    assert tanhs("none") == 4
    assert tanhs("full") >= 7  # the last one may be kept: its gradient comes at once
