"""Token counts and tokens' places: the golden table, the rounding modes, every treatment."""

import dataclasses

import numpy as np
import pytest

from cli_jax.image import anyres
from cli_jax.image.errors import ImageError

# (width, height): grid (columns, rows), unpadded (rows, columns), out (rows, columns), tokens.
# Computed with transformers and LLaVA-NeXT, which agree on these.
GOLDEN = {
    (336, 336): ((1, 1), (27, 27), (27, 27), 1485),
    (384, 384): ((1, 1), (27, 27), (27, 27), 1485),
    (385, 384): ((2, 1), (27, 28), (27, 28), 1512),
    (400, 300): ((2, 1), (27, 36), (27, 36), 1728),
    (500, 375): ((2, 1), (27, 36), (27, 36), 1728),
    (640, 480): ((2, 2), (40, 54), (40, 54), 2929),
    (480, 640): ((2, 2), (54, 40), (54, 40), 2943),
    (768, 768): ((2, 2), (54, 54), (54, 54), 3699),
    (1000, 600): ((3, 2), (48, 81), (48, 81), 4665),
    (1024, 768): ((3, 2), (54, 73), (54, 73), 4725),
    (1024, 899): ((3, 3), (71, 81), (71, 81), 6551),
    (1152, 1152): ((3, 3), (81, 81), (81, 81), 7371),
    (1200, 800): ((4, 3), (73, 108), (73, 108), 8686),
    (1280, 720): ((4, 2), (54, 96), (54, 96), 5967),
    (1920, 1080): ((5, 3), (75, 135), (60, 108), 7269),
    (2304, 2304): ((6, 6), (162, 162), (81, 81), 7371),
    (2000, 3000): ((4, 6), (162, 108), (99, 66), 7362),
    (4000, 3000): ((6, 5), (121, 162), (70, 93), 7309),
}


@pytest.mark.parametrize("rounding", ["hf", "original"])
@pytest.mark.parametrize("size", GOLDEN, ids=lambda s: f"{s[0]}x{s[1]}")
def test_golden_table(ov, size, rounding):
    image, vision = ov
    (columns, rows), unpadded, out, tokens = GOLDEN[size]
    plan = anyres.layout(*size, dataclasses.replace(image, rounding=rounding), vision, single=True)
    assert plan.num_tiles == 1 + rows * columns
    assert (plan.grid, plan.unpadded, plan.out) == ((rows, columns), unpadded, out)
    assert plan.num_tokens == tokens == len(plan.plan_index) == len(plan.plan_weight)
    # 729 base tokens without a newline, then one newline behind every row.
    expected = np.zeros(tokens, bool)
    expected[729 + out[1] :: out[1] + 1] = True
    np.testing.assert_array_equal(plan.newline, expected)


@pytest.mark.parametrize(
    ("size", "hf", "original"),
    [((1872, 832), 7263, 7248), ((369, 820), 2437, 2381)],
)
def test_the_roundings_differ_where_the_references_do(ov, size, hf, original):
    image, vision = ov
    counts = {
        rounding: anyres.layout(
            *size, dataclasses.replace(image, rounding=rounding), vision, single=True
        ).num_tokens
        for rounding in ("hf", "original")
    }
    assert counts == {"hf": hf, "original": original}


def test_float_floor_division_decides_the_rows():
    assert anyres.token_grid(50, 162, 729, 9)[0] == 44  # floor(50 / times) would be 45


def test_the_tolerance_itself_is_tolerated():
    assert anyres.token_grid(11, 11, 100, 1) == (11, 11)  # times is 1.1 exactly
    assert anyres.token_grid(11, 12, 100, 1) == (9, 10)


def test_the_largest_token_counts(ov):
    image, vision = ov

    def tokens(rows, columns):
        out_rows, out_columns = anyres.token_grid(rows, columns, 729, 9)
        return 729 + out_rows * (out_columns + 1)

    sides = range(30, 163)  # smaller grids never reach the maximum
    assert max((tokens(r, c), (r, c)) for r in sides for c in sides) == (8829, (162, 49))
    assert anyres.layout(1150, 1378, image, vision, single=True).num_tokens == 8765  # of 1x1..6x6
    only = dataclasses.replace(image, grid_pinpoints=((2304, 1152),))
    plan = anyres.layout(490, 1620, only, vision, single=True)
    assert (plan.unpadded, plan.num_tokens) == ((162, 49), 8829)


def test_anyres_without_a_maximum_never_shrinks(ov):
    image, vision = ov
    image = dataclasses.replace(image, aspect_ratio="anyres")
    plan = anyres.layout(2304, 2304, image, vision, single=True)
    assert (plan.num_tiles, plan.num_tokens) == (37, 729 + 162 * 163)
    assert set(np.unique(plan.plan_weight)) == {0.0, 1.0}
    # Every patch is read exactly once.
    read = plan.plan_index[plan.plan_weight == 1]
    np.testing.assert_array_equal(np.sort(read), np.arange(37 * 729))


@pytest.mark.parametrize("kind", ["square", "pad", "crop"])
@pytest.mark.parametrize("single", [True, False])
def test_one_tile_has_its_patches_and_no_newline(llava15, kind, single):
    image, vision = llava15
    image = dataclasses.replace(image, aspect_ratio=kind)
    plan = anyres.layout(1000, 10, image, vision, single=single)
    assert (plan.num_tiles, plan.num_tokens, plan.newline.any()) == (1, 576, False)
    assert (plan.grid, plan.unpadded, plan.out) == ((0, 0), (0, 0), (0, 0))
    np.testing.assert_array_equal(plan.plan_index[:, 0], np.arange(576))
    np.testing.assert_array_equal(plan.plan_weight, np.tile([1, 0, 0, 0], (576, 1)))


def test_one_of_several_pictures_has_one_newline_at_its_end(ov):
    image, vision = ov
    plan = anyres.layout(2304, 2304, image, vision, single=False)
    assert (plan.num_tiles, plan.num_tokens) == (1, 730)
    np.testing.assert_array_equal(np.flatnonzero(plan.newline), [729])
    np.testing.assert_array_equal(plan.plan_index[:729, 0], np.arange(729))
    np.testing.assert_array_equal(plan.plan_weight[:729], np.tile([1, 0, 0, 0], (729, 1)))
    np.testing.assert_array_equal(plan.plan_weight[729], np.zeros(4))


def test_same_treats_several_pictures_like_one(ov):
    image, vision = ov
    image = dataclasses.replace(image, multi_image="same")
    assert anyres.layout(640, 480, image, vision, single=False).num_tokens == 2929


def test_pinpoints_are_height_width_and_ties_go_to_the_first(ov):
    _, vision = ov
    tall_first = ((768, 384), (384, 768))
    assert anyres.select_best_resolution(800, 400, tall_first) == (384, 768)
    assert anyres.select_best_resolution(400, 800, tall_first) == (768, 384)
    assert anyres.select_best_resolution(100, 100, tall_first) == (768, 384)
    assert anyres.select_best_resolution(100, 100, tall_first[::-1]) == (384, 768)
    image = dataclasses.replace(ov[0], grid_pinpoints=tall_first)
    assert anyres.layout(800, 400, image, vision, single=True).grid == (1, 2)


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (1_000_000, 3), (1, 1), (2, 1)])
@pytest.mark.parametrize("pinpoints", ["ov", "two"])
def test_extreme_sizes_have_a_consistent_layout(ov, size, pinpoints):
    image, vision = ov
    if pinpoints == "two":
        image = dataclasses.replace(image, grid_pinpoints=((384, 768), (768, 384)))
    plan = anyres.layout(*size, image, vision, single=True)
    rows, columns = plan.out
    assert plan.num_tokens == 729 + rows * (columns + 1) == len(plan.plan_index)
    assert plan.plan_index.min() >= 0
    assert plan.plan_index.max() < plan.num_tiles * 729


def test_a_row_that_shrinks_to_nothing_is_refused(ov):
    image, vision = ov
    image = dataclasses.replace(
        image, aspect_ratio="anyres_max_1", grid_pinpoints=((384, 384 * 40),)
    )
    with pytest.raises(ImageError, match="too elongated"):
        anyres.layout(100_000, 10, image, vision, single=True)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_empty_picture_is_refused(ov, size, single):
    with pytest.raises(ImageError, match="empty"):
        anyres.layout(*size, *ov, single=single)


@pytest.mark.parametrize("name", ["anyres_max_0", "anyres_max_", "anyres_9", "squash", ""])
def test_an_unknown_aspect_ratio_is_refused_by_name(ov, name):
    image, vision = ov
    with pytest.raises(ValueError, match=f"'{name}': use anyres_max_N"):
        anyres.layout(5, 5, dataclasses.replace(image, aspect_ratio=name), vision, single=True)


@pytest.mark.parametrize(
    ("pinpoints", "message"),
    [((), "grid_pinpoints is empty"), (((384, 400),), "multiples of vision.image_size = 384")],
)
def test_unusable_pinpoints_are_refused_by_name(ov, pinpoints, message):
    image, vision = ov
    image = dataclasses.replace(image, grid_pinpoints=pinpoints)
    with pytest.raises(ValueError, match=message):
        anyres.layout(5, 5, image, vision, single=True)
