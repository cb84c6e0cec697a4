"""Pictures as PNG files: heatmaps a paper could print, and curves."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cli_jax.output import write_file
from cli_jax.train.workdir import read_lines

DPI = 200
ANNOTATE_UP_TO = 12  # cells along either side; more would not be readable


class PlotError(RuntimeError):
    """A picture cannot be drawn; the message says what is missing and how to get it."""


def require_matplotlib() -> None:
    """Raises PlotError if matplotlib is absent; call it before any long computation."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("drawing needs matplotlib: pip install 'cli-jax[demo]'")


def heatmap(
    values: np.ndarray,
    path: epath.PathLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_title: str,
    column_title: str,
    value_title: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws `values` [len(rows), len(columns)] with row 0 at the bottom, values written when few.

    `limits` fixes the color scale; without it the scale spans the values.
    """
    if values.shape != (len(rows), len(columns)):
        raise ValueError(f"{values.shape} values for {len(rows)} rows, {len(columns)} columns")
    low, high = limits or (float(values.min()), float(values.max()))
    figure = new_figure(min(2.6 + 0.45 * len(columns), 7.5), min(1.8 + 0.38 * len(rows), 7.0))
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.suptitle(title, fontsize=9, wrap=True)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    axes.set_xticks(*_ticks(columns), fontsize=_font(columns))
    axes.set_yticks(*_ticks(rows), fontsize=_font(rows))
    figure.colorbar(image, ax=axes, label=value_title)
    if max(values.shape) <= ANNOTATE_UP_TO:
        middle = (low + high) / 2
        form = ".2f" if np.abs(values).max() >= 0.1 else ".2g"  # of closed gates, not only 0.00
        for (row, column), value in np.ndenumerate(values):
            color = "black" if value > middle else "white"
            axes.text(
                column, row, f"{value:{form}}", ha="center", va="center", color=color, fontsize=7
            )
    save(figure, path)


def lines(
    values: Mapping[str, np.ndarray],
    path: epath.PathLike,
    *,
    columns: Sequence[str],
    levels: Mapping[str, float],
    title: str,
    column_title: str,
    value_title: str,
) -> None:
    """Draws a line of len(columns) values for every name, and its level as a dotted line."""
    figure = new_figure(min(3.0 + 0.4 * len(columns), 7.5), 3.6)
    axes = figure.add_subplot()
    for name, line in values.items():
        if len(line) != len(columns):
            raise ValueError(f"{name}: {len(line)} values for {len(columns)} columns")
        (drawn,) = axes.plot(range(len(columns)), line, marker="o", markersize=3.5, label=name)
        axes.axhline(levels[name], color=drawn.get_color(), linestyle=":", linewidth=1)
    figure.suptitle(title, fontsize=9, wrap=True)
    axes.set_xlabel(column_title)
    axes.set_ylabel(value_title)
    axes.set_xticks(*_ticks(columns))
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save(figure, path)


def loss_curve(metrics: epath.PathLike, path: epath.PathLike, per: str = "token") -> None:
    """Draws the training loss over steps from a workdir's `metrics.jsonl`.

    Raises PlotError if the file is missing or holds no line with `step` and `loss`.
    """
    metrics = epath.Path(metrics)
    if not metrics.is_file():
        raise PlotError(f"{metrics} does not exist: give the metrics.jsonl that train.py wrote")
    lines = read_lines(metrics)
    # A resumed run writes some steps again: the later line of a step is the one that counts.
    points = {line["step"]: line["loss"] for line in lines if "step" in line and "loss" in line}
    if not points:
        raise PlotError(f"{metrics} holds no line with step and loss")
    steps = np.array(sorted(points))
    losses = np.array([points[step] for step in steps])
    figure = new_figure(5.0, 3.2)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="logged")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.6, label="smoothed")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {per})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, path)


def similarity_map(
    values: np.ndarray,
    path: epath.PathLike,
    *,
    groups: Sequence[tuple[int, int, int]],
    title: str,
) -> None:
    """Draws similarities [E, E] of layers 0..E-1, and (first, last, medoid) of groups of them."""
    from matplotlib.patches import Rectangle

    E = len(values)
    side = min(3.2 + 0.16 * E, 7.0)
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", cmap="viridis", vmax=1.0)
    for first, last, medoid in groups:
        size = last - first + 1
        frame = Rectangle(
            (first - 0.5, first - 0.5), size, size, fill=False, edgecolor="white", linewidth=1.8
        )
        axes.add_patch(frame)
        axes.plot(
            medoid, medoid, "o", color="tab:red", markeredgecolor="white", markersize=7, zorder=3
        )
    frame.set_label("groups")
    axes.lines[-1].set_label("medoids " + ", ".join(str(group[2]) for group in groups))
    layers = [str(layer) for layer in range(E)]
    axes.set_xticks(*_ticks(layers), fontsize=_font(layers))
    axes.set_yticks(*_ticks(layers), fontsize=_font(layers))
    axes.set_xlabel("vision layer (0 = embeddings)")
    axes.set_ylabel("vision layer")
    figure.suptitle(title, fontsize=9, wrap=True)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, facecolor="0.6", frameon=True)
    figure.colorbar(image, ax=axes, label="mean cosine similarity")
    save(figure, path)


def attention_curve(
    mass: np.ndarray, path: epath.PathLike, *, saturation: int | None, title: str
) -> None:
    """Draws attention mass [n] over decoder layers, and the layer from which it has settled."""
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.plot(mass, color="tab:blue", marker="o", markersize=3.5, linewidth=1.4)
    if saturation is not None:
        axes.axvline(
            saturation, color="tab:red", linestyle="--", linewidth=1.2, label=f"s = {saturation}"
        )
        axes.legend(frameon=False, title="saturation layer")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("attention probability on image tokens")
    axes.set_ylim(0, min(1.08 * float(mass.max()), 1.0))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=9, wrap=True)
    save(figure, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered moving mean over a twentieth of the curve; shorter windows at both ends."""
    half = max(len(values) // 40, 1)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _ticks(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Every label while they fit, else every second, fourth, ..."""
    every = 1
    while len(labels) / every > 32:
        every *= 2
    index = list(range(0, len(labels), every))
    return index, [labels[i] for i in index]


def _font(labels: Sequence[str]) -> int:
    """Points in which that many labels do not touch."""
    return 10 if len(labels) <= 20 else 7


def save(figure: Any, path: epath.PathLike) -> None:
    """Writes a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI, format="png")
    write_file(path, png.getvalue())


def new_figure(width: float, height: float) -> Any:
    """A figure in inches, drawn without a display and without matplotlib's global state."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
