"""Tiles and normalized values are bit-identical to transformers' Pillow image processors."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cli_jax.image import anyres, preprocess
from cli_jax.image.errors import ImageError

SIZES = [
    (1, 1),
    (17, 900),
    (900, 17),
    (384, 384),
    (385, 384),
    (301, 77),  # odd remainders of the padding
    (333, 777),
    (640, 480),
    (481, 640),
    (1024, 899),
    (1150, 1378),
    (1201, 333),
]


def picture(width, height, seed=0):
    """Noise on a gradient: edges everywhere, no symmetry, distinct channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) % 256], -1)
    noise = rng.integers(-60, 60, (height, width, 3))
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def ours(image, image_cfg, vision_cfg, *, single=True):
    """float32 [m, 3, H, W] as the processors return it."""
    tiles = preprocess.make_tiles(image, image_cfg, vision_cfg, single=single)
    assert tiles.dtype == np.uint8
    expected = anyres.layout(*image.size, image_cfg, vision_cfg, single=single).num_tiles
    assert tiles.shape == (expected, vision_cfg.image_size, vision_cfg.image_size, 3)
    out = preprocess.normalize(tiles, image_cfg)
    assert out.dtype == np.float32
    return out.transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def processors():
    auto = pytest.importorskip("transformers")
    half = (0.5, 0.5, 0.5)
    size = {"shortest_edge": 336}
    crop = {"height": 336, "width": 336}
    return {
        "onevision": auto.LlavaOnevisionImageProcessorPil(image_mean=half, image_std=half),
        "siglip": auto.SiglipImageProcessorPil(
            size={"height": 384, "width": 384}, resample=Image.Resampling.BICUBIC
        ),
        "clip": auto.CLIPImageProcessorPil(size=size, crop_size=crop),
        "llava": auto.LlavaImageProcessorPil(size=size, crop_size=crop, do_pad=True),
    }


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_anyres(ov, processors, size):
    image = picture(*size)
    theirs = processors["onevision"](images=[image], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours(image, *ov), theirs)


def test_anyres_with_asymmetric_pinpoints(ov, processors):
    image_cfg = dataclasses.replace(ov[0], grid_pinpoints=((384, 1152), (768, 384)))
    pinpoints = [list(p) for p in image_cfg.grid_pinpoints]
    for size in [(1000, 300), (300, 1000), (500, 500)]:
        image = picture(*size)
        theirs = processors["onevision"](
            images=[image], image_grid_pinpoints=pinpoints, return_tensors="np"
        )["pixel_values"][0]
        np.testing.assert_array_equal(ours(image, image_cfg, ov[1]), theirs)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_one_of_several_pictures_is_padded_with_gray(ov, processors, size):
    image = picture(*size)
    batch = processors["onevision"](images=[[image, picture(9, 9)]], return_tensors="np")
    np.testing.assert_array_equal(ours(image, *ov, single=False)[0], batch["pixel_values"][0][0])
    if size == (640, 480):
        tile = preprocess.make_tiles(image, *ov, single=False)[0]
        assert (tile[:40] == 127).all()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_square(ov, processors, size):
    image_cfg = dataclasses.replace(ov[0], aspect_ratio="square")
    image = picture(*size)
    theirs = processors["siglip"](images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(image, image_cfg, ov[1]), theirs)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pad(llava15, processors, size):
    image = picture(*size)
    theirs = processors["llava"](images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(image, *llava15), theirs)
    np.testing.assert_array_equal(ours(image, *llava15, single=False), theirs)
    if size == (640, 480):
        tile = preprocess.make_tiles(image, *llava15, single=True)[0]
        assert (tile[:35] == [122, 116, 104]).all()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_crop(llava15, processors, size):
    image_cfg = dataclasses.replace(llava15[0], aspect_ratio="crop")
    image = picture(*size)
    theirs = processors["clip"](images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(image, image_cfg, llava15[1]), theirs)


def test_tiles_are_the_base_view_and_then_row_by_row(ov):
    quarters = np.zeros((768, 768, 3), np.uint8)
    for k, (y, x) in enumerate([(0, 0), (0, 384), (384, 0), (384, 384)]):
        quarters[y : y + 384, x : x + 384] = 50 * (k + 1)
    tiles = preprocess.make_tiles(Image.fromarray(quarters), *ov, single=True)
    assert [int(t[100, 100, 0]) for t in tiles[1:]] == [50, 100, 150, 200]
    assert tiles[0, 50, 50, 0] == 50
    assert tiles[0, 330, 50, 0] == 150


def test_the_canvas_is_black_and_centered(ov):
    white = Image.new("RGB", (768, 500), (255, 255, 255))
    tiles = preprocess.make_tiles(white, *ov, single=True)
    assert (tiles[0] == 255).all()  # the base view is squashed, not padded
    assert (tiles[1, :134] == 0).all()
    assert (tiles[1, 134:] == 255).all()
    assert (tiles[4, -134:] == 0).all()


def test_a_mode_other_than_rgb_is_refused_with_the_remedy(ov):
    with pytest.raises(ValueError, match=r"mode is RGBA: use image\.convert"):
        preprocess.make_tiles(Image.new("RGBA", (4, 4)), *ov, single=True)


@pytest.mark.parametrize("kind", ["pad", "crop", "square", "anyres_max_9"])
@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_resizing_stays_within_max_pixels(ov, kind, size):
    image, vision = ov
    image = dataclasses.replace(image, aspect_ratio=kind, max_pixels=1_000_000)
    picture = Image.new("RGB", size)
    if size[0] > size[1] and kind in ("square", "anyres_max_9"):
        # Rows are shortened first, so this one never grows.
        assert preprocess.make_tiles(picture, image, vision, single=True).shape[-1] == 3
    else:
        reason = "padded to a square" if kind == "pad" else "too elongated"
        with pytest.raises(ImageError, match=f"{reason}.* max_pixels=1000000"):
            preprocess.make_tiles(picture, image, vision, single=True)
