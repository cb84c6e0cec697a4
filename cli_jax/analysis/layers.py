"""How alike are the layers of the vision tower, and which few stand for all?

Layer-wise representation similarity (docs/method.md, "Looking inside"): the cosine of a patch
token's hidden states at two layers, averaged over tokens and pictures, for every pair of layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cli_jax.analysis.plots import require_matplotlib, similarity_map
from cli_jax.analysis.prompts import AnalysisError, Findings, Prompts
from cli_jax.data import Sample
from cli_jax.evaluate.run import whole_rows
from cli_jax.experiment import Experiment
from cli_jax.generate.engine import everywhere, split_rows
from cli_jax.output import writable_folder, write_arrays


class Group(NamedTuple):
    """Neighboring layers first..last, and the one that stands for them."""

    first: int
    last: int
    medoid: int


@dataclasses.dataclass
class Similarity:
    """Running sum of cosines [E, E] over patch tokens, float64; it does not grow with pictures.

    E = blocks + 1: entry k is layer k of `hidden_states`, 0 the embeddings, k the k-th block.
    """

    sums: np.ndarray
    tokens: int = 0
    pictures: int = 0

    def mean(self) -> np.ndarray:
        """The mean [E, E]; exactly symmetric, with ones on the diagonal."""
        mean = (self.sums + self.sums.T) / (2 * self.tokens)
        np.fill_diagonal(mean, 1.0)
        return mean


def mean_similarity(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    *,
    limit: int = 0,
    batch_size: int | None = None,
) -> tuple[Similarity, dict[str, str]]:
    """Similarity over the pictures of a LLaVA-format file, and {id: reason} of rows left out.

    Every block that the model holds is compared, those after V_last too, and every patch token of
    every tile counts once: a picture of many tiles weighs more than one of few, and one that is
    asked about twice counts twice. What was padded inside a tile is part of it, as the tower sees
    it; CLIP's class token is not. `batch_size` counts tiles. Raises AnalysisError if there is no
    picture.
    """
    vision = experiment.model.vision
    prompts = Prompts(experiment, path, image_root, limit=limit, what="layers")
    layers = tuple(range(vision.num_hidden_layers + 1))
    found = Similarity(np.zeros((len(layers), len(layers))))

    def direction(x_TxNxV: jax.Array, _: Any) -> jax.Array:
        x_TxNxV = x_TxNxV.astype(jnp.float32)
        return x_TxNxV / jnp.linalg.norm(x_TxNxV, axis=-1, keepdims=True)

    @jax.jit
    def cosines(params: Any, tiles: jax.Array, real_T: jax.Array) -> jax.Array:
        tiles, real_T = split_rows((tiles, real_T))
        look = (tiles[:, None], layers, layers[-1], direction, None)
        u_ExTxNxV, _ = model.apply({"params": params}, *look, method="look")
        real_ExTxNxV = u_ExTxNxV * real_T[:, None, None]
        sums = jnp.einsum("etnv,ftnv->ef", real_ExTxNxV, u_ExTxNxV, precision="highest")
        return everywhere(sums)

    def samples() -> Iterator[Sample]:
        for _, sample in prompts.samples():
            found.pictures += sample.extent.images
            yield sample

    for tiles, real_T in tile_batches(
        samples(), whole_rows(batch_size or experiment.eval.batch_size)
    ):
        found.sums += jax.device_get(cosines(params, tiles, real_T))
        found.tokens += int(real_T.sum()) * vision.num_patches
    if not found.pictures:
        raise prompts.nothing("picture that could be read")
    if not np.isfinite(found.sums).all():
        raise AnalysisError("a hidden state of the vision tower is zero or not finite")
    return found, prompts.left_out


def tile_batches(samples: Iterable[Sample], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tiles uint8 [size, H, W, 3] of the samples in order, and float32 [size]: 1 = a real tile.

    Only the last batch is padded, with zeros; nothing but what does not fill a batch is held back.
    """
    held: list[np.ndarray] = []
    for sample in samples:
        held.extend(sample.tiles)
        while len(held) >= size:
            yield np.stack(held[:size]), np.ones(size, np.float32)
            del held[:size]
    if held:
        rest = np.stack(held)
        padding = [(0, size - len(rest)), *[(0, 0)] * 3]
        yield np.pad(rest, padding), (np.arange(size) < len(rest)).astype(np.float32)


def group_layers(similarity_ExE: np.ndarray, groups: int) -> tuple[Group, ...]:
    """The blocks 1..E-1 in contiguous groups of layers that are alike, found exactly.

    Maximized is the mean, over blocks, of a block's mean similarity to its group:

        sum over groups g of 1/|g| sum over i, j in g of S[i, j]        divided by the block count

    so every block counts once. A mean over pairs would leave the largest group, which has most of
    them, to decide; a mean over groups would reward cutting off single blocks. (A block's
    similarity to itself, i = j, adds the same to every split.) The embeddings, layer 0, are in the
    matrix but in no group: they are not the work of a block. A group's medoid is the block with
    the largest mean similarity to the group; of equals, the first. 1 <= groups < E.
    """
    n = len(similarity_ExE) - 1
    S = similarity_ExE[1:, 1:]

    def value(start: int, stop: int) -> float:
        return float(S[start:stop, start:stop].sum()) / (stop - start)

    # Of the first `stop` blocks in as many groups as rounds are done: value and cuts.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (value(0, stop), (0, stop)) for stop in range(1, n + 1)
    }
    for done in range(1, groups):
        longer = {}
        for stop in range(done + 1, n + 1):
            options = [
                (best[cut][0] + value(cut, stop), (*best[cut][1], stop))
                for cut in range(done, stop)
            ]
            longer[stop] = max(options, key=lambda option: option[0])
        best = longer
    cuts = best[n][1]
    return tuple(
        Group(a + 1, b, a + 1 + int(S[a:b, a:b].sum(axis=1).argmax()))
        for a, b in itertools.pairwise(cuts)
    )


def summary(found: Similarity, groups: tuple[Group, ...], last_layer: int) -> str:
    """What the picture says in words, and the medoids as settings to paste."""
    mean = found.mean()
    blocks = len(mean) - 1
    lines = [
        f"{blocks} vision layers, {found.tokens:,} patch tokens of {found.pictures:,} pictures in "
        f"prompts; layer 0 is the embedding, k the k-th block, {last_layer} feeds the projector"
        + (f", {last_layer + 1}..{blocks} nothing" if last_layer < blocks else "")
    ]
    for g in groups:
        part = mean[g.first : g.last + 1, g.first : g.last + 1].mean()
        lines.append(f"layers {g.first}..{g.last}: medoid {g.medoid}, mean similarity {part:.3f}")
    medoids = ",".join(str(g.medoid) for g in groups) + ("," if len(groups) == 1 else "")
    return "\n".join(
        [
            *lines,
            f"--config.fusion.layer_concat.layers='({medoids})'",
            f"--config.fusion.cli.taps='({medoids})'",
        ]
    )


def analyze_layers(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    output_dir: str | Path,
    *,
    groups: int = 3,
    limit: int = 0,
    batch_size: int | None = None,
) -> Findings:
    """`mean_similarity` and `group_layers`, written to `layers.npz` and `layers.png`.

    The npz holds `similarity` [E, E], `layers` [E] (0 = embeddings), `groups` [G, 2] (first and
    last layer), `medoids` [G], `last_layer` (V_last), `tokens` and `pictures`.
    """
    require_matplotlib()
    folder = writable_folder(output_dir)
    blocks = experiment.model.vision.num_hidden_layers
    if groups > blocks:
        raise AnalysisError(f"{blocks} blocks cannot be split into {groups} groups: take fewer")
    found, left_out = mean_similarity(
        model, params, experiment, path, image_root, limit=limit, batch_size=batch_size
    )
    mean, last_layer = found.mean(), experiment.model.vision.last_layer
    split = group_layers(mean, groups)
    if jax.process_index():
        return Findings([], left_out)
    written = [folder / "layers.npz", folder / "layers.png"]
    _save(written[0], found, split, last_layer)
    similarity_map(
        mean,
        written[1],
        groups=split,
        title=f"{experiment.name} on {Path(path).stem}: similarity of vision layers\n"
        f"{found.tokens:,} patch tokens of {found.pictures:,} pictures in prompts",
    )
    return Findings(written, left_out, summary(found, split, last_layer))


def _save(path: epath.Path, found: Similarity, split: tuple[Group, ...], last_layer: int) -> None:
    mean = found.mean()
    write_arrays(
        path,
        similarity=mean,
        layers=np.arange(len(mean)),
        groups=np.array([(g.first, g.last) for g in split]),
        medoids=np.array([g.medoid for g in split]),
        last_layer=last_layer,
        tokens=found.tokens,
        pictures=found.pictures,
    )
