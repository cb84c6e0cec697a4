"""What a vision tower holds of each of some places side by side in a picture, layer by layer.

A place (a box, a digit) is a strip of patches as high as the picture; of an any-resolution picture
the patches of the high-resolution tiles count, not those of the base view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.image.anyres import layout, treatment
from cli_jax.model.vision import VisionTower, normalize

Summary = Literal["pooled", "cells"]
PATCHES = 20_000  # that the principal components of pixels are found from


class PlaceError(ValueError):
    """Pictures whose places cannot be told apart; the message says why."""


def place_patches(
    width: int, height: int, places: int, image: ImageConfig, vision: VisionConfig
) -> np.ndarray:
    """Patches [places, C] of each place, as indices into the M*N patches of a picture's tiles.

    Raises PlaceError if the patches of a row cannot be shared out evenly.
    """
    kind, g = treatment(image, single=True).kind, vision.grid
    if kind not in ("anyres", "square"):
        raise PlaceError(
            f"config.model.image.aspect_ratio={image.aspect_ratio}: places are told apart in "
            f"pictures that fill their tiles, with anyres or square"
        )
    found = layout(width, height, image, vision, single=True)
    rows, columns = (n * g for n in (found.grid if kind == "anyres" else (1, 1)))
    first = 1 if kind == "anyres" else 0  # behind the base view
    y, x = np.arange(rows)[:, None], np.arange(columns)[None]
    tile = first + y // g * (columns // g) + x // g
    index = tile * vision.num_patches + y % g * g + x % g
    if kind == "anyres" and found.unpadded != (rows, columns):
        raise PlaceError(f"pictures of {width} x {height} pixels do not fill their tiles")
    if columns % places:
        raise PlaceError(f"{columns} columns of patches cannot be shared by {places} places")
    return index.reshape(rows, places, columns // places).swapaxes(0, 1).reshape(places, -1)


def summarize(x_BxPxV: jax.Array, at_RxC: np.ndarray, summary: Summary) -> jax.Array:
    """Patches [B, M*N, V] -> features [B, R, F] of places.

    `pooled`: mean and maximum over a place's patches, wherever in it something is; F = 2 V.
    `cells`: all its patches one after another; F = C V.
    """
    x_BxRxCxV = x_BxPxV[:, at_RxC]
    if summary == "cells":
        return x_BxRxCxV.reshape(*x_BxRxCxV.shape[:2], -1)
    return jnp.concatenate([jnp.mean(x_BxRxCxV, axis=2), jnp.max(x_BxRxCxV, axis=2)], axis=-1)


def patch_pixels(tiles: Any, image: ImageConfig, vision: VisionConfig) -> jax.Array:
    """Tiles uint8 [B, M, H, W, 3] -> normalized pixels of their patches [B, M*N, p*p*3]."""
    (B, M), g, p = tiles.shape[:2], vision.grid, vision.patch_size
    used = normalize(tiles[:, :, : g * p, : g * p], image)
    patches = used.reshape(B, M, g, p, g, p, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    return patches.reshape(B, M * g * g, p * p * 3)


def principal_components(x_nxF: np.ndarray, count: int) -> np.ndarray:
    """The directions [F, count] in which samples vary most, orthonormal; behind the F-th, zeros."""
    centered = np.asarray(x_nxF, np.float64) - x_nxF.mean(axis=0)
    _, directions = np.linalg.eigh(centered.T @ centered)  # ascending
    most = directions[:, ::-1][:, :count].astype(np.float32)
    return np.pad(most, ((0, 0), (0, count - most.shape[1])))


def layer_features(
    tower: VisionTower, image: ImageConfig, at_RxC: np.ndarray, summary: Summary
) -> Callable[[Any, Any, Any], jax.Array]:
    """A compiled function (tower parameters, components, tiles) -> features [K, B, R, F].

    tiles uint8 [B, M, H, W, 3]. The first of the K entries is the pixels of the patches in V
    principal components [p*p*3, V], as many numbers as a layer has; the others are the tower's
    layers 0 (the embedding) to V_last.
    """
    vision = tower.config
    layers = tuple(range(vision.last_layer + 1))

    @jax.jit
    def features(params: Any, components: Any, tiles: Any) -> jax.Array:
        B, M = tiles.shape[:2]

        def of_layer(x_TxNxV: jax.Array, _: Any) -> jax.Array:
            x_BxPxV = x_TxNxV.reshape(B, M * x_TxNxV.shape[1], -1).astype(jnp.float32)
            return summarize(x_BxPxV, at_RxC, summary)

        flat = normalize(tiles.reshape(B * M, *tiles.shape[2:]), image)
        found, _ = tower.apply({"params": params}, flat, layers, layers[-1], of_layer)
        pixels = patch_pixels(tiles, image, vision) @ components
        return jnp.concatenate([summarize(pixels, at_RxC, summary)[None], found])

    return features


def in_batches(tiles: Iterable[np.ndarray], rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Stacks of `rows` pictures, the last one filled up with zeros; each with how many it holds."""
    waiting: list[np.ndarray] = []
    for each in tiles:
        waiting.append(each)
        if len(waiting) == rows:
            yield rows, np.stack(waiting)
            waiting = []
    if waiting:
        padding = [np.zeros_like(waiting[0])] * (rows - len(waiting))
        yield len(waiting), np.stack(waiting + padding)
