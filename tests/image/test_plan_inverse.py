"""Plans are proper (weights sum to 1, no double reads) and their inverses are exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image import anyres
from cli_jax.image.grid import lerp

GRID = 4  # patches along a side: small enough for dense matrices
VISION = VisionConfig(image_size=GRID * 10, patch_size=10)
PATCHES = VISION.num_patches

layouts = st.builds(
    lambda width, height, name, rounding, single: anyres.layout(
        width,
        height,
        ImageConfig(
            aspect_ratio=name,
            rounding=rounding,
            grid_pinpoints=tuple((40 * i, 40 * j) for i in range(1, 5) for j in range(1, 5)),
        ),
        VISION,
        single=single,
    ),
    st.integers(5, 400),
    st.integers(5, 400),
    st.sampled_from(["anyres_max_1", "anyres_max_2", "anyres_max_3", "anyres", "square"]),
    st.sampled_from(["hf", "original"]),
    st.sampled_from([True, True, True, False]),
)


def dense(plan_index, plan_weight, num_patches):
    """The plan as a matrix [p, num_patches]."""
    matrix = np.zeros((len(plan_index), num_patches))
    for slot, (index, weight) in enumerate(zip(plan_index, plan_weight, strict=True)):
        np.add.at(matrix[slot], index, weight)
    return matrix


def dense_inverse(inverse, plan_weight):
    """The matrix [p, num_patches] again, from the inverse; each entry at most once."""
    slots = len(plan_weight)
    matrix = np.zeros((slots, len(inverse)))
    weights = np.append(plan_weight.ravel(), 0)
    for patch, entries in enumerate(inverse):
        real = entries[entries < slots * 4]
        assert len(set(real)) == len(real)
        np.add.at(matrix[:, patch], real // 4, weights[real])
    return matrix


@settings(max_examples=150, deadline=None)
@given(layouts)
def test_plan_and_inverse_are_the_same_matrix(plan):
    count = plan.num_tiles * PATCHES
    inverse = anyres.plan_inverse(plan.plan_index, plan.plan_weight, count)
    assert inverse.shape == (count, 4)
    assert inverse.dtype == np.int32
    np.testing.assert_array_equal(
        dense_inverse(inverse, plan.plan_weight),
        dense(plan.plan_index, plan.plan_weight, count),
    )
    assert (np.diff(inverse, axis=1) >= 0).all()  # ascending, "none" last
    assert inverse.max() <= plan.num_tokens * 4


@settings(max_examples=150, deadline=None)
@given(layouts)
def test_plans_are_proper(plan):
    assert (plan.plan_index.dtype, plan.plan_weight.dtype) == (np.int32, np.float32)
    assert plan.newline.dtype == bool
    assert plan.plan_index.min() >= 0
    assert plan.plan_index.max() < plan.num_tiles * PATCHES
    assert (plan.plan_weight >= 0).all()
    total = plan.plan_weight.sum(1, dtype=np.float64)
    np.testing.assert_allclose(total, np.where(plan.newline, 0, 1), atol=2e-7)
    for index, weight in zip(plan.plan_index, plan.plan_weight, strict=True):
        read = index[weight > 0]
        assert len(set(read)) == len(read)


def test_weights_sum_to_one_at_full_size(ov):
    for size in [(4000, 3000), (1920, 1080), (2304, 2304)]:
        plan = anyres.layout(*size, *ov, single=True)
        total = plan.plan_weight.sum(1, dtype=np.float64)
        np.testing.assert_allclose(total, np.where(plan.newline, 0, 1), atol=2e-7)


def test_the_inverse_is_exact_at_full_size(ov):
    plan = anyres.layout(4000, 3000, *ov, single=True)
    inverse = anyres.plan_inverse(plan.plan_index, plan.plan_weight, plan.num_tiles * 729)
    patch, _ = np.nonzero(inverse < plan.num_tokens * 4)
    entries = inverse[inverse < plan.num_tokens * 4]
    np.testing.assert_array_equal(np.sort(entries), np.flatnonzero(plan.plan_weight))
    np.testing.assert_array_equal(plan.plan_index.ravel()[entries], patch)


def test_a_source_read_twice_at_the_border_is_merged():
    """An enlarging plan clamps at both ends; no layout does, but the rule must hold anyway."""
    sources, weights = lerp(2, 5)
    np.testing.assert_array_equal(sources[-1], [1, 1])
    np.testing.assert_array_equal(weights[-1], [1, 0])
    np.testing.assert_allclose(weights.sum(1), 1)


def test_a_patch_read_five_times_is_refused():
    index, weight = np.zeros((5, 4), np.int32), np.zeros((5, 4), np.float32)
    weight[:, 0] = 1
    with pytest.raises(ValueError, match="patch 0 is read 5 times"):
        anyres.plan_inverse(index, weight, 3)
    weight[4, 0] = 0  # four reads are fine, and a read without weight is none
    inverse = anyres.plan_inverse(index, weight, 3)
    np.testing.assert_array_equal(inverse, [[0, 4, 8, 12], [20] * 4, [20] * 4])


@pytest.mark.parametrize("patch", [-1, 3])
def test_a_patch_out_of_range_is_refused(patch):
    index = np.full((1, 4), patch, np.int32)
    weight = np.array([[1, 0, 0, 0]], np.float32)
    with pytest.raises(ValueError, match="of 3"):
        anyres.plan_inverse(index, weight, 3)


def test_padding_slots_leave_no_trace():
    inverse = anyres.plan_inverse(np.zeros((6, 4), np.int32), np.zeros((6, 4), np.float32), 2)
    np.testing.assert_array_equal(inverse, np.full((2, 4), 24))
