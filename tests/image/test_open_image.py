"""Opening pictures: nothing leaves the root, nothing too large is decoded, every mode works."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from cli_jax.image.errors import ImageError
from cli_jax.image.preprocess import open_image

LIMIT = 10_000


@pytest.fixture
def root(tmp_path):
    """root/sub/ok.png inside, outside.png and root2/ok.png next to it."""
    for folder in ("root/sub", "root2"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "root" / "sub" / "ok.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "outside.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "root2" / "ok.png")
    return tmp_path / "root"


def encoded(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, **kwargs)
    return buffer.getvalue()


def noise(*shape, mode="RGB"):
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def png_of_size(width, height):
    """A PNG of any claimed size in a few bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("path", ["sub/ok.png", "./sub/ok.png", "sub/../sub/ok.png"])
def test_a_picture_inside_the_root(root, path):
    image = open_image(root, path, LIMIT)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), (1, 2, 3))
    os.unlink(root / "sub" / "ok.png")
    assert np.asarray(image).shape == (6, 8, 3)  # decoded, independent of the file


def test_the_root_may_be_a_string_or_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    assert open_image(str(tmp_path / "link"), "sub/ok.png", LIMIT).size == (8, 6)


@pytest.mark.parametrize("path", ["../outside.png", "sub/../../outside.png", "../root2/ok.png"])
def test_dots_out_of_the_root_are_refused(root, path):
    with pytest.raises(ImageError, match="leaves the image root"):
        open_image(root, path, LIMIT)


def test_an_absolute_path_is_refused_even_inside_the_root(root):
    with pytest.raises(ImageError, match="is absolute; give it relative"):
        open_image(root, str(root / "sub" / "ok.png"), LIMIT)


def test_links_out_of_the_root_are_refused_and_links_inside_followed(root, tmp_path):
    (root / "file.png").symlink_to(tmp_path / "outside.png")
    (root / "relative.png").symlink_to("../outside.png")
    (root / "folder").symlink_to(tmp_path / "root2")
    (root / "inside.png").symlink_to("sub/ok.png")
    for path in ("file.png", "relative.png", "folder/ok.png"):
        with pytest.raises(ImageError, match="leaves the image root"):
            open_image(root, path, LIMIT)
    assert open_image(root, "inside.png", LIMIT).size == (8, 6)


@pytest.mark.parametrize("path", ["sub/ok.png\0", "\0", "", None, 3, ["sub/ok.png"]])
def test_what_is_no_path_is_refused(root, path):
    with pytest.raises(ImageError, match="is not a path"):
        open_image(root, path, LIMIT)


def test_what_is_no_file_is_refused(root):
    os.mkfifo(root / "pipe")  # opening it would block
    (root / "loop").symlink_to("loop")
    for path, reason in [
        ("sub", "is not a file"),
        ("pipe", "is not a file"),
        ("absent.png", "no such file"),
        ("loop", "cannot be resolved"),
        ("x" * 5000, "cannot be resolved"),
        ("sub/ok.png/deeper", "cannot be resolved"),
    ]:
        with pytest.raises(ImageError, match=reason):
            open_image(root, path, LIMIT)


def test_max_pixels_is_checked_before_decoding(root, monkeypatch):
    (root / "bomb.png").write_bytes(png_of_size(9000, 9000))
    noise(100, 100, 3).save(root / "exact.png")
    noise(101, 100, 3).save(root / "over.png")
    assert open_image(root, "exact.png", LIMIT).size == (100, 100)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for name, size in [("bomb.png", "9000 x 9000"), ("over.png", "100 x 101")]:
        with pytest.raises(ImageError, match=f"{size} pixels are more than max_pixels=10000"):
            open_image(root, name, LIMIT)


def test_pillows_own_limit_is_an_image_error_too(root):
    (root / "bomb.png").write_bytes(png_of_size(30_000, 30_000))
    with pytest.raises(ImageError, match="DecompressionBombError"):
        open_image(root, "bomb.png", 10**12)


BROKEN = {
    "truncated.png": encoded(noise(64, 64, 3), format="PNG")[:-2000],
    "truncated.jpg": encoded(noise(64, 64, 3), format="JPEG")[:-1000],
    "truncated.gif": encoded(noise(64, 64, mode="L"), format="GIF")[:-1000],
    "truncated.webp": encoded(noise(64, 64, 3), format="WEBP", lossless=True)[:-1000],
    "truncated.tiff": encoded(noise(64, 64, 3), format="TIFF")[:-1000],
    "truncated.bmp": encoded(noise(64, 64, 3), format="BMP")[:-1000],
    "short_data.png": png_of_size(60, 60),
    "empty.png": b"",
    "text.png": b"<html>404 not found</html>",
    "header.png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_a_reason(root, name):
    (root / name).write_bytes(BROKEN[name])
    with pytest.raises(ImageError, match=r"not a readable picture: \w+: "):
        open_image(root, name, LIMIT)


def test_formats_that_run_programs_are_not_even_tried(root):
    noise(64, 64, 3).save(root / "program.eps")
    with pytest.raises(ImageError, match="UnidentifiedImageError"):
        open_image(root, "program.eps", LIMIT)


def test_damage_in_the_middle_has_a_reason(root):
    data = bytearray(encoded(noise(64, 64, 3), format="PNG"))
    data[500:520] = bytes(20)
    (root / "damaged.png").write_bytes(data)
    with pytest.raises(ImageError, match="not a readable picture"):
        open_image(root, "damaged.png", LIMIT)


def palette_with_transparency():
    image = noise(9, 7, 3).quantize(16)
    image.info["transparency"] = 3
    return image


PICTURES = {
    "bits.png": noise(9, 7, mode="1"),
    "gray.png": noise(9, 7, mode="L"),
    "gray.jpg": noise(9, 7, mode="L"),
    "gray_alpha.png": noise(9, 7, 2),
    "palette.png": noise(9, 7, 3).quantize(16),
    "palette.gif": noise(9, 7, 3).quantize(16),
    "palette_transparent.png": palette_with_transparency(),
    "rgba.png": noise(9, 7, 4),
    "rgba.webp": noise(9, 7, 4),
    "cmyk.jpg": noise(9, 7, 4).convert("RGB").convert("CMYK"),
    "cmyk.tiff": noise(9, 7, 4).convert("RGB").convert("CMYK"),
    "sixteen.png": Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000),
    "sixteen.tiff": Image.fromarray(np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000),
    "plain.ppm": noise(9, 7, 3),
    "plain.bmp": noise(9, 7, 3),
    "plain.jp2": noise(9, 7, 3),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_mode_is_converted_as_pillow_does_it(root, name):
    PICTURES[name].save(root / name)
    with Image.open(root / name) as reference:
        expected = np.asarray(reference.convert("RGB"))
    image = open_image(root, name, LIMIT)
    assert (image.mode, image.size) == ("RGB", (7, 9))
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_alpha_is_dropped_and_not_composited(root):
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(root / "clear.png")
    assert open_image(root, "clear.png", LIMIT).getpixel((0, 0)) == (10, 20, 30)


def test_exif_orientation_is_not_applied(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    noise(9, 7, 3).save(root / "turned.jpg", exif=exif)
    assert open_image(root, "turned.jpg", LIMIT).size == (7, 9)
