"""What strategies add to pictures: deepstack's stacks against torch, pooled tokens, extra tiles."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image import anyres
from cli_jax.image.extras import Extras
from cli_jax.image.preprocess import make_tiles
from cli_jax.image.stacks import stack_grid

torch = pytest.importorskip("torch")

TILE, G = 40, 4
VISION = VisionConfig(image_size=TILE, patch_size=10)
N = VISION.num_patches
ANYRES = ImageConfig(
    aspect_ratio="anyres_max_2",
    grid_pinpoints=tuple((TILE * i, TILE * j) for i in range(1, 5) for j in range(1, 5)),
)
SIDES = st.integers(5, 400)


def one_tile(name):
    return ImageConfig(aspect_ratio=name, multi_image="same")


def stitched(features, rows, columns):
    """Features [1 + rows*columns, N, C] of a base view and tiles -> their grid [rows*G, ., C]."""
    grid = [
        [features[1 + r * columns + c].reshape(G, G, -1) for c in range(columns)]
        for r in range(rows)
    ]
    return np.concatenate([np.concatenate(row, axis=1) for row in grid], axis=0)


def applied(index, weight, features):
    """The plan [..., 4] on features [tiles, N + E, C]."""
    flat = features.reshape(-1, features.shape[-1])
    return np.einsum("...rc,...r->...c", flat[index], weight)


def drawn(plan, pooled=0):
    rng = np.random.default_rng(0)
    return rng.normal(size=(plan.num_tiles, N + pooled, 3))


# ---- stacks --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from([1, 2, 3]))
def test_anyres_stacks_are_strides_of_the_resampled_grid(width, height, s):
    """The whole grid of tiles, padding included, as torch interpolates it."""
    plan = anyres.layout(width, height, ANYRES, VISION, single=True, extras=Extras(stacks=s * s))
    features = drawn(plan)
    L = torch.tensor(stitched(features, *plan.grid)).permute(2, 0, 1)[None]
    L = torch.nn.functional.interpolate(L, (s * G, s * G), mode="bilinear", align_corners=False)
    L = L[0].permute(1, 2, 0)
    found = applied(plan.stack_index, plan.stack_weight, features)
    assert found.shape == (s * s, N, 3)
    for i in range(s):
        for j in range(s):
            expected = L[i::s, j::s].reshape(N, 3)
            np.testing.assert_allclose(found[i * s + j], expected, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["square", "pad", "crop"]), st.integers(2, 6))
def test_one_tile_stacks_are_strides_of_the_grid_itself(width, height, name, m):
    plan = anyres.layout(
        width, height, one_tile(name), VISION, single=True, extras=Extras(stacks=m, tiles=m)
    )
    rows, columns = plan.grid
    assert 2 <= rows * columns <= m
    assert plan.num_tiles == 1 + rows * columns
    assert plan.num_tokens == N
    features = drawn(plan)
    L = stitched(features, rows, columns)
    found = applied(plan.stack_index, plan.stack_weight, features)
    for i in range(rows):
        for j in range(columns):
            expected = L[i::rows, j::columns].reshape(N, 3)
            np.testing.assert_array_equal(found[i * columns + j], expected)
    assert (plan.stack_weight[rows * columns :] == 0).all()  # fewer tiles, empty stacks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(2, 9))
def test_the_grid_is_chosen_as_deepstack_does(width, height, m):
    """Its candidates are (width, height) in tiles, ties go to the first."""
    best, most, least = None, 0, math.inf
    for i in range(1, m + 1):
        for j in range(1, m // i + 1):
            if i == j == 1:
                continue
            w, h = i * TILE, j * TILE
            scale = min(w / width, h / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if kept > most or (kept == most and w * h - kept < least):
                best, most, least = (j, i), kept, w * h - kept
    assert stack_grid(width, height, VISION, m) == best


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from([1, 4, 9]), st.booleans())
def test_no_patch_is_read_more_often_than_the_batch_has_room_for(width, height, m, is_anyres):
    image = ANYRES if is_anyres or m == 1 else one_tile("pad")
    plan = anyres.layout(width, height, image, VISION, single=True, extras=Extras(stacks=m))
    index, weight = plan.stack_index.reshape(-1, 4), plan.stack_weight.reshape(-1, 4)
    inverse = anyres.plan_inverse(index, weight, plan.num_tiles * N, 4 * m)  # raises if not
    assert inverse.shape == (plan.num_tiles * N, 4 * m)
    total = weight.sum(1, dtype=np.float64)
    np.testing.assert_allclose(total, np.round(total), atol=2e-7)  # 0 or 1


def test_a_patch_may_be_read_as_often():
    """The bound is reached: one tile at twice its size."""
    plan = anyres.layout(TILE, TILE, ANYRES, VISION, single=True, extras=Extras(stacks=4))
    assert plan.grid == (1, 1)
    reads = np.bincount(plan.stack_index[plan.stack_weight > 0])
    assert reads.max() == 16


def test_pictures_among_others_get_no_stacks():
    for image in (ANYRES, dataclasses.replace(one_tile("pad"), multi_image="pad_newline")):
        plan = anyres.layout(99, 55, image, VISION, single=False, extras=Extras(stacks=4))
        assert plan.num_tiles == 1
        assert plan.stack_weight.shape == (4, N, 4)
        assert not plan.stack_weight.any()


def test_impossible_numbers_of_stacks_are_refused():
    with pytest.raises(ValueError, match=r"3 stacks: any-resolution .* a square, such as 4 or 9"):
        anyres.layout(50, 50, ANYRES, VISION, single=True, extras=Extras(stacks=3))
    with pytest.raises(ValueError, match="1 stacks: a picture of one tile needs 2 or more"):
        anyres.layout(50, 50, one_tile("pad"), VISION, single=True, extras=Extras(stacks=1))


# ---- pooled tokens -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.booleans(), st.booleans(), st.integers(1, 5))
def test_pooled_tokens_stand_behind_the_picture(width, height, is_anyres, single, E):
    """The rest of the picture is as without them; only the base view's are read."""
    image = ANYRES if is_anyres else one_tile("pad")
    plain = anyres.layout(width, height, image, VISION, single=single)
    plan = anyres.layout(width, height, image, VISION, single=single, extras=Extras(pooled=E))
    features = drawn(plan, E)
    found = applied(plan.plan_index, plan.plan_weight, features)
    tokens = applied(plain.plan_index, plain.plan_weight, features[:, :N])
    np.testing.assert_allclose(found, np.concatenate([tokens, features[0, N:]]), atol=1e-12)
    np.testing.assert_array_equal(plan.newline, np.append(plain.newline, np.zeros(E, bool)))
    assert (plan.num_tiles, plan.grid, plan.out) == (plain.num_tiles, plain.grid, plain.out)


# ---- both ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    SIDES,
    SIDES,
    st.sampled_from([ANYRES, *map(one_tile, ("square", "pad", "crop"))]),
    st.booleans(),
    st.sampled_from([Extras(pooled=3), Extras(stacks=4), Extras(2, 9), Extras()]),
)
def test_sizes_are_those_of_the_layout(width, height, image, single, extras):
    plan = anyres.layout(width, height, image, VISION, single=single, extras=extras)
    sizes = anyres.layout_size(width, height, image, VISION, single=single, extras=extras)
    assert sizes == (plan.num_tiles, plan.num_tokens)


@pytest.mark.parametrize("name", ["square", "pad", "crop"])
@pytest.mark.parametrize("size", [(120, 35), (33, 90), (50, 50), (200, 190)])
def test_extra_tiles_are_the_stretched_picture_cut(name, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture, extras = Image.fromarray(pixels), Extras(stacks=4, tiles=4)
    tiles = make_tiles(picture, one_tile(name), VISION, single=True, extras=extras)
    plan = anyres.layout(*size, one_tile(name), VISION, single=True, extras=extras)
    rows, columns = plan.grid
    assert len(tiles) == plan.num_tiles
    plain = make_tiles(picture, one_tile(name), VISION, single=True)
    np.testing.assert_array_equal(tiles[:1], plain)
    canvas = np.asarray(picture.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC))
    for i in range(rows):
        for j in range(columns):
            cut = canvas[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
            np.testing.assert_array_equal(tiles[1 + i * columns + j], cut)


def test_anyres_tiles_are_the_same_with_and_without_stacks():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    with_stacks = make_tiles(picture, ANYRES, VISION, single=True, extras=Extras(stacks=4))
    np.testing.assert_array_equal(with_stacks, make_tiles(picture, ANYRES, VISION, single=True))
