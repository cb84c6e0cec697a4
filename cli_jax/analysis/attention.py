"""How long does a decoder look at its pictures? Attention from text to image, layer by layer.

mass[t] is the attention probability that decoder layer t gives to image positions, averaged over
its heads, over the text tokens behind the last image token of a prompt, and over prompts
(docs/method.md, "Looking inside"). Where it has settled, image tokens have little left to say.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from cli_jax.analysis.plots import attention_curve, heatmap, require_matplotlib
from cli_jax.analysis.prompts import AnalysisError, Findings, Prompts
from cli_jax.batch import Batch
from cli_jax.evaluate.run import whole_rows
from cli_jax.experiment import Experiment
from cli_jax.generate.buckets import TEXT_UNIT, round_up
from cli_jax.generate.engine import everywhere, split_rows
from cli_jax.model.gather import take_or_zero
from cli_jax.output import writable_folder, write_arrays

TOLERANCE = 0.02  # of the attention probability: how near to its end a settled curve stays


@dataclasses.dataclass
class Mass:
    """Running sum [n, H] over prompts, float64: n decoder layers, H heads."""

    sums: np.ndarray
    prompts: int = 0

    def per_head(self) -> np.ndarray:
        return self.sums / self.prompts

    def curve(self) -> np.ndarray:
        return self.per_head().mean(axis=1)


def saturation(curve: np.ndarray, tolerance: float = TOLERANCE) -> int | None:
    """The first layer from which the curve [n] stays within `tolerance` of its last quarter's mean.

    The last quarter is n // 4 layers, at least one; a curve of fewer than eight layers settles at
    its last one at the latest. None where the curve never settles: even the last layer is further
    from that mean.
    """
    end = curve[-max(len(curve) // 4, 1) :].mean()
    away = np.flatnonzero(np.abs(curve - end) > tolerance)
    first = int(away[-1]) + 1 if len(away) else 0
    return first if first < len(curve) else None


def last_text(batch: Batch) -> np.ndarray:
    """Positions [B, Q] of a row's text tokens behind its last image token; L = none.

    One prompt per row. Rows without a picture have none. Q is rounded up, so that there are few
    shapes to compile.
    """
    B, L = batch["input_ids"].shape
    slots = batch["visual_position"]
    last_B = np.max(np.where(slots < L, slots, -1), axis=1, initial=-1)
    behind = (batch["segment_ids"] > 0) & (np.arange(L) > last_B[:, None]) & (last_B >= 0)[:, None]
    positions = np.full((B, round_up(int(behind.sum(axis=1).max()), TEXT_UNIT)), L, np.int32)
    for row, own in enumerate(behind):
        positions[row, : own.sum()] = np.flatnonzero(own)
    return positions


def image_mass(
    q_BxLxHxd: jax.Array,
    k_BxLxGxd: jax.Array,
    query_BxQ: jax.Array,
    is_image_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
) -> jax.Array:
    """Attention probability on image positions [B, H], averaged over the queries at `query`.

    Causal, within a segment, softmax in float32, as `model/attention.py`. Key-value heads take
    turns: the largest array is [B, H/G, Q, L], and no [L, L] is ever made.
    """
    B, L, H, d = q_BxLxHxd.shape
    G = k_BxLxGxd.shape[2]
    q_BxQxGxRxd = take_or_zero(q_BxLxHxd.reshape(B, L, H * d), query_BxQ).reshape(
        B, -1, G, H // G, d
    )
    own_BxQ = jnp.take_along_axis(segment_ids_BxL, jnp.minimum(query_BxQ, L - 1), axis=1)
    seen_BxQxL = (jnp.arange(L) <= query_BxQ[..., None]) & (
        own_BxQ[..., None] == segment_ids_BxL[:, None]
    )
    real_BxQ = (query_BxQ < L).astype(jnp.float32)

    def one_group(qk: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BxQxRxd, k_BxLxd = qk
        scores = jnp.einsum(
            "BQRd,BLd->BRQL", q_BxQxRxd, k_BxLxd, preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen_BxQxL[:, None], scores * d**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1)
        mass_BxRxQ = jnp.sum(weights, axis=-1, where=is_image_BxL[:, None, None])
        total = jnp.sum(mass_BxRxQ * real_BxQ[:, None], axis=-1)
        return total / jnp.maximum(jnp.sum(real_BxQ, axis=-1), 1)[:, None]

    groups = jnp.moveaxis(q_BxQxGxRxd, 2, 0), jnp.moveaxis(k_BxLxGxd, 2, 0)
    mass_GxBxR = jax.lax.map(one_group, groups)
    return jnp.moveaxis(mass_GxBxR, 0, 1).reshape(B, H)


def mean_mass(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    *,
    limit: int = 0,
    batch_size: int | None = None,
) -> tuple[Mass, dict[str, str]]:
    """Attention mass over the prompts of a LLaVA-format file, and {id: reason} of rows left out.

    A prompt is a row up to its last answer, with the words that ask for it, and without the answer.
    Image positions are all of the prompt's, newline tokens included. Every prompt counts once.
    What a fusion strategy adds before a layer is part of what that layer attends with. Raises
    AnalysisError if no prompt has text behind a picture, and for a model in which not every layer
    sees every token.
    """
    text, routing = experiment.model.text, experiment.model.routing.name
    if routing != "none":
        raise AnalysisError(
            f"the model is routed (config.routing.name={routing}): its late layers never see a "
            f"picture; analyze the model that it was made from"
        )
    prompts = Prompts(experiment, path, image_root, limit=limit, what="attention")
    mass = Mass(np.zeros((text.num_hidden_layers, text.num_attention_heads)))

    @jax.jit
    def forward(params: Any, batch: Any, query_BxQ: jax.Array) -> jax.Array:
        batch, query_BxQ = split_rows((batch, query_BxQ))
        is_image_BxL = batch["visual_index"] < batch["visual_position"].shape[1]

        def see(q_BxLxHxd: jax.Array, k_BxLxGxd: jax.Array) -> jax.Array:
            return image_mass(q_BxLxHxd, k_BxLxGxd, query_BxQ, is_image_BxL, batch["segment_ids"])

        return everywhere(model.apply({"params": params}, batch, see, method="watch")[1])

    for questions, batch in prompts.batches(whole_rows(batch_size or experiment.eval.batch_size)):
        query_BxQ = last_text(batch)
        mass_nxBxH = jax.device_get(forward(params, batch, query_BxQ))
        for row, question in enumerate(questions):
            if query_BxQ[row, 0] == batch["input_ids"].shape[1]:
                prompts.left_out[question.id] = "no text behind the last picture"
                continue
            mass.sums += mass_nxBxH[:, row]
            mass.prompts += 1
    if not mass.prompts:
        raise prompts.nothing("prompt with text behind a picture")
    if not np.isfinite(mass.sums).all():
        raise AnalysisError("the attention of some layer is not finite")
    return mass, prompts.left_out


def summary(mass: Mass) -> str:
    """The curve in words, and its saturation layer as a setting to paste."""
    curve = mass.curve()
    n, settled = len(curve), saturation(curve)
    shown = sorted({0, n // 4, n // 2, 3 * n // 4, n - 1})
    lines = [
        f"attention from text to image over {mass.prompts:,} prompts: "
        + ", ".join(f"{curve[t]:.3f} at layer {t}" for t in shown)
    ]
    if settled is None:
        lines.append(f"the curve never settles within {TOLERANCE} of the mean of its last quarter")
    else:
        lines.append(
            f"saturation layer s = {settled} of {n}: from here on within {TOLERANCE} of the mean"
            f" of the last quarter\n--config.routing.saturation={max(settled, 1)}"
        )
        if not settled:
            lines.append("(1 is the least: vision tokens pass one layer at least)")
    return "\n".join(lines)


def analyze_attention(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    output_dir: str | Path,
    *,
    per_head: bool = False,
    limit: int = 0,
    batch_size: int | None = None,
) -> Findings:
    """`mean_mass` and `saturation`, written to `attention.npz` and `attention.png`.

    The npz holds `mass` [n], `saturation` (-1 where the curve never settles), `tolerance` and
    `prompts`; with `per_head` also `mass_per_head` [n, H], drawn in `attention_heads.png`.
    """
    require_matplotlib()
    folder = writable_folder(output_dir)
    mass, left_out = mean_mass(
        model, params, experiment, path, image_root, limit=limit, batch_size=batch_size
    )
    if jax.process_index():
        return Findings([], left_out)
    settled = saturation(mass.curve())
    title = f"{experiment.name} on {Path(path).stem}: attention from text to image"
    title += f"\n{mass.prompts:,} prompts"
    written = [folder / "attention.npz", folder / "attention.png"]
    arrays: dict[str, Any] = {
        "mass": mass.curve(),
        "saturation": -1 if settled is None else settled,
        "tolerance": TOLERANCE,
        "prompts": mass.prompts,
    }
    if per_head:
        arrays["mass_per_head"] = mass.per_head()
    write_arrays(written[0], **arrays)
    attention_curve(mass.curve(), written[1], saturation=settled, title=title)
    if per_head:
        written.append(folder / "attention_heads.png")
        _draw_heads(mass.per_head(), written[-1], title)
    return Findings(written, left_out, summary(mass))


def _draw_heads(mass_nxH: np.ndarray, path: epath.Path, title: str) -> None:
    heatmap(
        mass_nxH,
        path,
        rows=[str(t) for t in range(len(mass_nxH))],
        columns=[str(h) for h in range(mass_nxH.shape[1])],
        title=title,
        row_title="decoder layer",
        column_title="head",
        value_title="attention on image tokens",
        limits=(0.0, float(mass_nxH.max())),
    )
