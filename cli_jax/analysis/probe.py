"""Where can colors, shapes, sizes and digits be read out of a pretrained vision tower?

For every layer, a linear read-out of frozen features: multinomial logistic regression of the counts
of one word (`black`, `circles`, ...) in a box, or of a digit of a meter. It is fitted on pictures
that the tower was trained on and scored on those of the scenes that were held out from it
(`data.held_out`); a fifth of the other scenes chooses the penalty. Evaluation files are not read.

    features   counts: mean and maximum over the patches of the box, since a count adds up what is
               anywhere in it; digits: the patches of the digit one after another, since its strokes
               are where they are
    controls   the pixels of the same patches, in as many principal components as a layer has
               numbers; and always the commonest answer

What is not found may still be there for whoever reads it in a less linear way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.analysis.places import (
    PATCHES,
    Summary,
    in_batches,
    layer_features,
    patch_pixels,
    place_patches,
    principal_components,
)
from cli_jax.analysis.plots import lines, require_matplotlib
from cli_jax.analysis.regression import read_out
from cli_jax.data.facts import CATEGORIES, Fact, facts
from cli_jax.data.ledger import drop_of
from cli_jax.data.parts import held_out_scenes, scene_of
from cli_jax.data.sources import RowError, open_sources
from cli_jax.evaluate.progress import progress_bar
from cli_jax.experiment import Experiment, load
from cli_jax.fusion import base
from cli_jax.image.errors import ImageError
from cli_jax.image.preprocess import image_size, make_tiles, open_image
from cli_jax.model.attention import kernel_for
from cli_jax.model.vision import VisionTower
from cli_jax.output import writable_folder, write_arrays
from cli_jax.train.checkpoint import find_step, load_params
from cli_jax.train.state import Params

CHOOSE = 0.2  # share of the scenes not held out that chooses the penalty
ROWS = 64  # pictures at a time


class ProbeError(ValueError):
    """A run that cannot be probed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A row to be probed: its facts, and what its scene is for: fit, choose or score."""

    root: str
    path: str
    facts: tuple[Fact, ...]
    use: str


@dataclasses.dataclass(frozen=True)
class Found:
    """Accuracy per category [K, C] of `layers` (K names, pixels first) and `categories`.

    commonest [C]: of always giving the commonest answer to the same question. scored [C]: answers.
    """

    layers: tuple[str, ...]
    categories: tuple[str, ...]
    accuracy: np.ndarray
    commonest: np.ndarray
    scored: np.ndarray

    def table(self) -> str:
        """One line per layer, one column per category."""
        rows = [("layer", *self.categories)]
        shares = zip(self.layers, self.accuracy, strict=True)
        rows += [(layer, *(f"{100 * a:.1f}%" for a in line)) for layer, line in shares]
        rows.append(("commonest", *(f"{100 * a:.1f}%" for a in self.commonest)))
        rows.append(("answers", *(f"{n:,}" for n in self.scored)))
        return "\n".join("".join(f"{cell:>10}" for cell in row) for row in rows)


def probe(workdir: str | Path, output: str | Path, step: int | None = None) -> Found:
    """Probes a checkpoint (the newest, or that of a step) of a run with `data.held_out`.

    Writes `probe.npz` (the fields of Found) and `probe.png` into `output`.
    """
    require_matplotlib()
    folder = writable_folder(output)
    experiment = load(workdir)
    step = find_step(workdir, step)
    pictures, left_out = read_pictures(experiment)
    if left_out:
        print(f"{left_out} rows cannot be used and are left out")
    tower, params = load_tower(experiment, workdir, step)
    features = read_features(experiment, pictures, tower, params)
    names = ("pixels", *map(str, range(experiment.model.vision.last_layer + 1)))
    found = score(features, pictures, names)
    write_arrays(folder / "probe.npz", **dataclasses.asdict(found))
    lines(
        {name: found.accuracy[:, i] for i, name in enumerate(found.categories)},
        folder / "probe.png",
        columns=found.layers,
        levels=dict(zip(found.categories, found.commonest, strict=True)),
        title=f"{experiment.name}, step {step}: read out of held-out pictures",
        column_title="vision layer (dotted: always the commonest answer)",
        value_title="accuracy",
    )
    return found


def read_pictures(experiment: Experiment) -> tuple[list[Picture], int]:
    """The rows of the run's training files with their facts, each for one use.

    And how many rows are left out, for what training leaves them out for, too.
    """
    if not experiment.data.held_out:
        raise ProbeError(
            f"{experiment.name} was trained on all its pictures: there is none to score on. Train "
            f"it with config.data.held_out"
        )
    data = dataclasses.replace(experiment.data, captions="")
    pictures, left_out = [], 0
    for part in ("train", "held_out"):
        found: list[tuple[str, str, str, tuple[Fact, ...]]] = []  # of all files
        for source, (file, _, root) in enumerate(zip(*open_sources(data, part), strict=True)):
            for i in range(len(file)):
                try:
                    row = file[i]
                    path = one_picture(row)
                    image_size(root, path, experiment.model.image.max_pixels)
                    found.append((scene_of(row, data.scene), root, path, tuple(facts(row))))
                except Exception as error:
                    if drop_of(error, source, i, "") is None:
                        raise
                    left_out += 1
        scenes = [scene for scene, *_ in found]
        choosing = held_out_scenes(scenes, CHOOSE) if part == "train" else set()
        for scene, root, path, known in found:
            use = "score" if part == "held_out" else "choose" if scene in choosing else "fit"
            pictures.append(Picture(root, path, known, use))
    for use, what in (("fit", "trained on"), ("score", "held out")):
        if not any(picture.use == use for picture in pictures):
            raise ProbeError(f"{experiment.name}: no row that was {what} can be used")
    return pictures, left_out


def one_picture(row: Mapping[str, Any]) -> str:
    """The path of a row's picture; RowError if it has none or several."""
    path = row.get("image")
    if not isinstance(path, str):
        raise RowError(f"a probe needs one picture a row, not {path!r:.80}")
    return path


def read_tiles(picture: Picture, experiment: Experiment, size: tuple[int, int]) -> np.ndarray:
    """The tiles uint8 [M, H, W, 3] of a picture of `size` (width, height) pixels."""
    image = experiment.model.image
    try:
        found = open_image(picture.root, picture.path, image.max_pixels)
    except ImageError as error:  # its header was sound
        raise ProbeError(f"{picture.path} cannot be decoded ({error}): remove its row") from error
    if found.size != size:
        raise ProbeError(
            f"{picture.path} has {found.size} pixels and others {size}: places are compared in "
            f"pictures of one size"
        )
    return make_tiles(found, image, experiment.model.vision, single=True)


def load_tower(
    experiment: Experiment, workdir: str | Path, step: int
) -> tuple[VisionTower, Params]:
    """The vision tower of a checkpoint, on one device, and its parameters."""
    model, compute = experiment.model, experiment.compute
    kernel: Any = kernel_for(compute.attention, jax.default_backend(), compute.dtype)
    tower = VisionTower(
        model.vision,
        dataclasses.replace(compute, attention=kernel),
        jnp.dtype(compute.dtype),
        jnp.dtype(compute.param_dtype),
    )
    size, last = model.vision.image_size, model.vision.last_layer
    tile = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    boxed = jax.eval_shape(lambda x: tower.init(jax.random.key(0), x, (), last, base.raw), tile)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nn.meta.unbox(boxed["params"]),
    )
    return tower, load_params(workdir, step, {"vision_tower": abstract})["vision_tower"]


def read_features(
    experiment: Experiment, pictures: list[Picture], tower: VisionTower, params: Params
) -> np.ndarray:
    """Features float32 [K, pictures, R, F] of the places of every picture."""
    image, vision = experiment.model.image, experiment.model.vision
    first = pictures[0]
    size = image_size(first.root, first.path, image.max_pixels)
    at_RxC = place_patches(*size, first.facts[0].places, image, vision)

    def tiles(some: Sequence[Picture]) -> Iterator[np.ndarray]:
        return (read_tiles(picture, experiment, size) for picture in some)

    seen = [picture for picture in pictures if picture.use == "fit"]
    seen = seen[:: max(1, len(seen) * at_RxC.size // PATCHES)]
    pixels = [np.asarray(patch_pixels(each[None], image, vision))[0] for each in tiles(seen)]
    patches = np.concatenate([each[at_RxC.ravel()] for each in pixels])
    components = principal_components(patches, vision.hidden_size)

    summary: Summary = "cells" if first.facts[0].category == "digit" else "pooled"
    compute = layer_features(tower, image, at_RxC, summary)
    found = []
    with progress_bar(len(pictures), "features", "picture") as bar:
        for count, stack in in_batches(tiles(pictures), ROWS):
            found.append(np.asarray(compute(params, components, stack))[:, :count])
            bar.update(count)
    return np.concatenate(found, axis=1)


def score(features: np.ndarray, pictures: list[Picture], layers: tuple[str, ...]) -> Found:
    """Fits one read-out per layer and word, and scores them by category.

    features [K, pictures, R, F]. Words of one number of samples share a compiled regression, so all
    are filled up to the same number.
    """
    asked = [(i, fact) for i, picture in enumerate(pictures) for fact in picture.facts]
    words = _readable(pictures)
    category = {fact.word: fact.category for _, fact in asked}
    classes = max(fact.value for _, fact in asked) + 1
    samples = max(Counter(fact.word for _, fact in asked).values())
    use_n = np.array([picture.use for picture in pictures])
    right = {word: np.zeros(len(layers)) for word in words}
    commonest, scored = Counter[str](), Counter[str]()
    with progress_bar(len(words) * len(layers), "read-outs", "fit") as bar:
        for word in words:
            mine = [(i, fact.place, fact.value) for i, fact in asked if fact.word == word]
            # Filled up with repetitions of the first sample, which are used for nothing.
            filled = mine + mine[:1] * (samples - len(mine))
            at, place, y = (np.array(column) for column in zip(*filled, strict=True))
            use = np.where(np.arange(samples) < len(mine), use_n[at], "")
            fit, choose, held = (use == name for name in ("fit", "choose", "score"))
            often = Counter(y[fit | choose].tolist()).most_common(1)[0][0]
            commonest[category[word]] += int(np.sum(y[held] == often))
            scored[category[word]] += int(np.sum(held))
            for k in range(len(layers)):
                found = read_out(features[k, at, place], y, fit, choose, classes)
                right[word][k] = np.sum(found[held] == y[held])
                bar.update()
    names = tuple(name for name in CATEGORIES if scored[name])
    totals = np.array([scored[name] for name in names])
    hits = [sum(right[word] for word in words if category[word] == name) for name in names]
    return Found(
        layers=layers,
        categories=names,
        accuracy=np.stack(hits, axis=1) / totals,
        commonest=np.array([commonest[name] for name in names]) / totals,
        scored=totals,
    )


def _readable(pictures: Sequence[Picture]) -> list[str]:
    """The words that a read-out can be fitted to and chosen for; says which ones it cannot."""
    uses: dict[str, set[str]] = {}
    for picture in pictures:
        for fact in picture.facts:
            uses.setdefault(fact.word, set()).add(picture.use)
    words = sorted(word for word, found in uses.items() if {"fit", "choose"} <= found)
    if rare := sorted(set(uses) - set(words)):
        print(f"left out, since too few scenes of the training files have it: {', '.join(rare)}")
    if not words:
        raise ProbeError("no word is in enough scenes to be read out: give more training pictures")
    return words
