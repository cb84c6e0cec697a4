"""Augmentation of a training picture before it is tiled: small shifts, zoom, color jitter.

Nothing is flipped: LLaVA's questions ask for left and right.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance

MAX_SHIFT = 0.1  # of a side, at strength 1
MAX_ZOOM = 0.15
MAX_JITTER = 0.4  # of brightness, contrast and color


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Strengths in [0, 1]: of shift and zoom, and of color jitter."""

    strength: float = 0.0
    jitter: float = 0.0

    def __bool__(self) -> bool:
        return max(dataclasses.astuple(self)) > 0


NO_AUGMENTATION = Augmentation()


def augment(image: Image.Image, rng: np.random.Generator, spec: Augmentation) -> Image.Image:
    """A changed copy of an RGB picture, of the same size so that its layout stays the same.

    What a shift uncovers gets the picture's mean color. Draws a fixed number of values from `rng`,
    so the result depends on its state alone.
    """
    strength = spec.strength
    zoom = 1 + strength * MAX_ZOOM * rng.uniform(-1, 1)
    shift = strength * MAX_SHIFT * rng.uniform(-1, 1, 2)
    factors = 1 + spec.jitter * MAX_JITTER * rng.uniform(-1, 1, 3)
    width, height = image.size
    # The affine map takes an output pixel to the input: scaled about the center, then shifted.
    scale = 1 / zoom
    left = width * ((1 - scale) / 2 + shift[0])
    top = height * ((1 - scale) / 2 + shift[1])
    if strength:
        mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0]
        image = image.transform(
            image.size,
            Image.Transform.AFFINE,
            (scale, 0, left, 0, scale, top),
            resample=Image.Resampling.BICUBIC,
            fillcolor=tuple(int(c) for c in mean),
        )
    jitters = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    if spec.jitter:
        for jitter, factor in zip(jitters, factors, strict=True):
            image = jitter(image).enhance(float(factor))
    return image
