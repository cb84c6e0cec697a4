"""Which vision layers does each decoder layer let in? Mean gates over a data set.

For every picture AGF gives W[t, k] in (0, 1) (docs/method.md section 1). Here they are averaged
over pictures, overall and per category, and drawn as decoder layer against vision layer.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cli_jax.analysis.plots import heatmap, require_matplotlib
from cli_jax.analysis.prompts import AnalysisError, Findings, Prompts
from cli_jax.batch import Batch
from cli_jax.config import ModelConfig
from cli_jax.evaluate.run import whole_rows
from cli_jax.experiment import Experiment
from cli_jax.fusion import registry
from cli_jax.generate.engine import everywhere, split_rows
from cli_jax.output import writable_folder, write_arrays


@dataclasses.dataclass
class GateMeans:
    """Running sums of gates [T, K] per category, float64; memory does not grow with pictures."""

    decoder_layers: tuple[str, ...]
    vision_layers: tuple[str, ...]
    sums: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))

    def add(self, category: str, gates: np.ndarray) -> None:
        """Takes the gates [T, K] of one picture."""
        expected = len(self.decoder_layers), len(self.vision_layers)
        if gates.shape != expected:
            raise ValueError(f"gates {gates.shape}, but the strategy declares {expected}")
        total = self.sums.setdefault(category, np.zeros(expected))
        total += gates
        self.counts[category] += 1

    @property
    def pictures(self) -> int:
        return sum(self.counts.values())

    def mean(self, category: str | None = None) -> np.ndarray:
        """Mean gates [T, K] over the pictures of a category, or over all."""
        if category is None:
            return sum(self.sums.values(), np.zeros(())) / self.pictures
        return self.sums[category] / self.counts[category]


def gate_layers(model: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the T decoder layers and K taps that gates stand for; a mean of layers is `3+4`.

    Raises AnalysisError for a strategy without gates.
    """
    strategy = registry.of(model)
    taps = strategy.gated_taps(model.fusion, model.vision)
    if not taps:
        raise AnalysisError(
            f"the fusion strategy {model.fusion_name!r} of this run has no gates "
            f"({model.fusion}); train one that has, such as fusion.name=cli with agf=gated"
        )
    points = strategy.decoder_layers(model.fusion, model.text)
    return tuple(map(str, points)), tuple("+".join(map(str, tap)) for tap in taps)


def mean_gates(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    *,
    limit: int = 0,
    batch_size: int | None = None,
) -> tuple[GateMeans, dict[str, str]]:
    """Mean gates over the pictures of a LLaVA-format file, and {id: reason} of rows left out.

    Every row contributes the gates of its prompt (the last question and what stands before it), so
    a picture counts as often as it is asked about; a channel gate enters with its mean over
    channels. Raises AnalysisError if there is no gate or no picture at all.
    """
    means = GateMeans(*gate_layers(experiment.model))
    prompts = Prompts(experiment, path, image_root, limit=limit, what="gates")

    @jax.jit
    def forward(params: Any, batch: Batch) -> jax.Array:
        gates = model.apply({"params": params}, split_rows(batch)).gates  # [T, B, I, K(, D)]
        gates = jnp.mean(gates, axis=-1) if gates.ndim == 5 else gates
        return everywhere(jnp.transpose(gates, (1, 2, 0, 3)))

    for questions, batch in prompts.batches(whole_rows(batch_size or experiment.eval.batch_size)):
        gates_BxIxTxK = jax.device_get(forward(params, batch))
        for row, question in enumerate(questions):
            for image in np.flatnonzero(batch["image_segment"][row]):
                means.add(question.category, gates_BxIxTxK[row, image])
    if not means.pictures:
        raise prompts.nothing("picture whose gates could be read")
    return means, prompts.left_out


def save(means: GateMeans, folder: epath.Path, title: str) -> list[epath.Path]:
    """Writes `gates.npz` and `gates.png`, and one `gates_CATEGORY.png` each if there are several.

    The npz holds `gates` [T, K], `decoder_layers` [T], `vision_layers` [K] (names), `pictures`,
    `categories` [C], `category_gates` [C, T, K] and `category_pictures` [C].
    """
    categories = sorted(means.sums)
    write_arrays(
        folder / "gates.npz",
        gates=means.mean(),
        decoder_layers=np.array(means.decoder_layers),
        vision_layers=np.array(means.vision_layers),
        pictures=means.pictures,
        categories=np.array(categories),
        category_gates=np.stack([means.mean(c) for c in categories]),
        category_pictures=np.array([means.counts[c] for c in categories]),
    )
    every = np.stack([means.mean(), *(means.mean(c) for c in categories)])
    limits = float(every.min()), float(every.max())  # one scale, so that the pictures compare
    written = [folder / "gates.npz"]

    def draw(name: str, gates: np.ndarray, count: int, what: str) -> None:
        heatmap(
            gates,
            folder / name,
            rows=means.decoder_layers,
            columns=means.vision_layers,
            title=f"{what}\n{count:,} pictures in prompts",
            row_title="decoder layer",
            column_title="vision layer",
            value_title="mean gate",
            limits=limits,
        )
        written.append(folder / name)

    draw("gates.png", means.mean(), means.pictures, title)
    if len(categories) > 1:
        for c in categories:
            draw(f"gates_{quote(c, safe='')}.png", means.mean(c), means.counts[c], f"{title}: {c}")
    return written


def analyze_gates(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    output_dir: str | Path,
    *,
    limit: int = 0,
    batch_size: int | None = None,
) -> Findings:
    """`mean_gates`, then `save`."""
    require_matplotlib()
    folder = writable_folder(output_dir)
    means, left_out = mean_gates(
        model, params, experiment, path, image_root, limit=limit, batch_size=batch_size
    )
    if jax.process_index():
        return Findings([], left_out)
    title = f"{experiment.name} on {Path(path).stem}"
    return Findings(save(means, folder, title), left_out)
