"""From a file to tiles: safe opening, resizing, padding, cutting, normalizing.

Every step is the references' own (Pillow's bicubic resize on uint8), so tiles are bit-identical to
theirs. Nothing here knows about tokens; the layout of the same picture is in `anyres.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image.anyres import one_tile_grid, tile_grid, treatment
from cli_jax.image.errors import ImageError
from cli_jax.image.extras import NO_EXTRAS, Extras

# Raster formats only. Pillow knows others whose decoders run programs (EPS) or that no data set
# has; a file is judged by its content and not by its name.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

BLACK = (0, 0, 0)


def open_image(root: str | os.PathLike[str], relpath: str, max_pixels: int) -> Image.Image:
    """Opens the picture `relpath` inside the folder `root` as RGB, fully decoded.

    RGB as Pillow's `convert("RGB")` makes it, like the original: alpha is dropped, and EXIF
    orientation is not applied. Raises ImageError(reason) if the path leaves `root` (symlinks are
    resolved first), if the picture has more than `max_pixels` pixels (checked before decoding;
    Pillow's own limit of 2 * Image.MAX_IMAGE_PIXELS stays in force) or if it cannot be decoded
    completely.
    """
    with _opened(root, relpath, max_pixels) as image:
        return image.convert("RGB")


def image_size(root: str | os.PathLike[str], relpath: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) of what `open_image` returns, from the file's header; no pixel is decoded.

    Raises ImageError as `open_image` does, but for what is wrong behind the header.
    """
    with _opened(root, relpath, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _opened(root: str | os.PathLike[str], relpath: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read and its size checked; what Pillow raises as ImageError."""
    path = _confine(Path(root), relpath)
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels are more than max_pixels={max_pixels}")
            if width * height == 0:
                raise ImageError(f"the picture is empty: {width} x {height} pixels")
            yield image
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a broken file makes them raise
        reason = f"not a readable picture: {type(error).__name__}: {error}"
        raise ImageError(reason) from error


def make_tiles(
    image: Image.Image,
    image_cfg: ImageConfig,
    vision_cfg: VisionConfig,
    *,
    single: bool,
    extras: Extras = NO_EXTRAS,
) -> np.ndarray:
    """The tiles of an RGB picture, in the order of `anyres.layout`: uint8 [m, H, W, 3].

    `single`: the sample has one picture. Matches LLaVA-NeXT's `process_anyres_image` and
    `expand2square`, and CLIP's image processor; the tiles that `extras` adds, DeepStack-VL's.
    Raises ImageError for a picture so elongated that resizing it would need more than `max_pixels`
    pixels, ValueError for a mode other than RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the picture's mode is {image.mode}: use image.convert('RGB') first")
    size, limit = vision_cfg.image_size, image_cfg.max_pixels
    how = treatment(image_cfg, single=single)
    if how.kind == "anyres":
        rows, columns = tile_grid(*image.size, image_cfg, vision_cfg)
        one = _resize(image, size, size, limit)  # squashed, not padded
        canvas = _fit(image, columns * size, rows * size, limit)
        return np.concatenate([np.asarray(one)[None], _cut(canvas, size)])
    if how.kind == "crop":
        one = _crop(image, size, limit)
    elif how.kind == "square":
        one = _resize(image, size, size, limit)
    else:
        one = _resize(_expand_to_square(image, image_cfg), size, size, limit)
    base = np.asarray(one)[None]
    rows, columns = one_tile_grid(*image.size, how, vision_cfg, extras)
    if not rows:
        return base
    canvas = _resize(image, columns * size, rows * size, limit)  # the whole picture, not padded
    return np.concatenate([base, _cut(canvas, size)])


def _cut(canvas: Image.Image, size: int) -> np.ndarray:
    """A canvas of whole tiles -> uint8 [m, size, size, 3], row by row."""
    rows, columns = canvas.height // size, canvas.width // size
    tiles = np.asarray(canvas).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    return tiles.reshape(-1, size, size, 3)


def normalize(tiles: np.ndarray, image_cfg: ImageConfig) -> np.ndarray:
    """uint8 [..., 3] -> float32 [..., 3], (x/255 - mean) / std, bit-exact to the references.

    They scale in float64, round to float32 and go on in float32; of 256 possible values per
    channel that is a table.
    """
    mean, std = (np.array(v, np.float32) for v in (image_cfg.image_mean, image_cfg.image_std))
    table = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - mean) / std
    return table[tiles, np.arange(3)]


def _confine(root: Path, relpath: str) -> Path:
    """The file that `relpath` names, which must lie in `root` after all links are followed."""
    if not isinstance(relpath, str) or not relpath or "\0" in relpath:  # JSON holds anything
        raise ImageError(f"{relpath!r} is not a path")
    if Path(relpath).is_absolute():
        raise ImageError(f"path {relpath!r} is absolute; give it relative to the image root")
    try:
        root = root.resolve(strict=True)
        path = (root / relpath).resolve(strict=True)
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {relpath!r} in {str(root)!r}") from error
    except (OSError, RuntimeError, ValueError) as error:  # link loops, over-long or odd names
        raise ImageError(f"path {relpath!r} cannot be resolved: {error}") from error
    if not path.is_relative_to(root):
        raise ImageError(f"path {relpath!r} leaves the image root")
    if not path.is_file():  # folders, and pipes or devices that would block
        raise ImageError(f"path {relpath!r} is not a file")
    return path


def _resize(image: Image.Image, width: int, height: int, max_pixels: int) -> Image.Image:
    """Pillow's bicubic resize, with its memory bounded: it resizes all rows in width first."""
    if width * max(height, image.height) > max_pixels:
        raise ImageError(
            f"{image.width} x {image.height} pixels are too elongated to be resized to {width} x "
            f"{height} within max_pixels={max_pixels}"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _fit(image: Image.Image, width: int, height: int, max_pixels: int) -> Image.Image:
    """Resized to fit width x height, aspect ratio kept, centered on black."""
    x_scale, y_scale = width / image.width, height / image.height
    if x_scale < y_scale:
        new_width, new_height = width, min(math.ceil(image.height * x_scale), height)
    else:
        new_width, new_height = min(math.ceil(image.width * y_scale), width), height
    canvas = Image.new("RGB", (width, height), BLACK)
    resized = _resize(image, new_width, new_height, max_pixels)
    canvas.paste(resized, ((width - new_width) // 2, (height - new_height) // 2))
    return canvas


def _expand_to_square(image: Image.Image, image_cfg: ImageConfig) -> Image.Image:
    """Centered on a square of the mean color: 127 gray for OneVision, CLIP's mean for LLaVA-1.5."""
    width, height = image.size
    side = max(width, height)
    if side**2 > image_cfg.max_pixels:
        raise ImageError(
            f"{width} x {height} pixels padded to a square are more than "
            f"max_pixels={image_cfg.max_pixels}"
        )
    color = tuple(int(mean * 255) for mean in image_cfg.image_mean)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _crop(image: Image.Image, size: int, max_pixels: int) -> Image.Image:
    """Shortest edge resized to `size`, then the center, as CLIP's image processor does it."""
    width, height = image.size
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    left, top = (new_width - size) // 2, (new_height - size) // 2
    resized = _resize(image, new_width, new_height, max_pixels)
    return resized.crop((left, top, left + size, top + size))
