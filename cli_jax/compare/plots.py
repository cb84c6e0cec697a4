"""The figures of a comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from cli_jax.analysis.plots import new_figure, save, smooth
from cli_jax.compare.config import HELD_OUT, Comparison
from cli_jax.compare.runs import Run, result_name
from cli_jax.output import read_json
from cli_jax.train import metrics
from cli_jax.train.workdir import read_lines

Json = dict[str, Any]
Points = dict[int, float]  # by step
_BLUE, _GRAY, _ORANGE = "tab:blue", "0.6", "tab:orange"


@dataclasses.dataclass(frozen=True)
class Curves:
    """Of one arm: by stage and seed the training loss, by seed the held-out curve."""

    label: str
    losses: dict[str, list[Points]]
    held_out: list[Points]


def accuracy_bars(rows: Sequence[Json], name: str, baseline: str, path: Path) -> None:
    """Accuracy of every row with its interval and its seeds, and the difference to the baseline."""
    labels = [row["label"] for row in rows]
    found = [row["sets"][name] for row in rows]
    y = np.arange(len(rows))[::-1]
    drawn = new_figure(8.2, 1.3 + 0.36 * len(rows))
    left, right = drawn.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.25, 1]})
    means = np.array([100 * each["mean"] for each in found])
    spans = 100 * np.array([each["interval"] for each in found]).T
    kinds = {True: _BLUE, False: _ORANGE}  # an arm, or what a selection has chosen
    colors = [
        _GRAY if row["label"] == baseline else kinds[row["label"] == row["arm"]] for row in rows
    ]
    left.barh(y, means, color=colors, alpha=0.75, height=0.62)
    errors = np.abs(spans - means)
    left.errorbar(means, y, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    for at, each in zip(y, found, strict=True):
        seeds = 100 * np.array(each["by_seed"])
        left.plot(seeds, np.full(len(seeds), at - 0.2), "|", color="black", markersize=5)
    for at, high, mean in zip(y, spans[1], means, strict=True):
        left.text(high + 1, at, f"{mean:.1f}", va="center", fontsize=8)
    left.set_yticks(y, labels)
    left.set_ylim(-0.7, len(rows) - 0.3)
    left.set_xlim(0, max(10.0, spans[1].max() * 1.15))
    left.set_xlabel(f"{name}: accuracy, %")
    left.set_title("95% interval; ticks: seeds", fontsize=8, color="0.35")
    right.axvline(0, color="0.4", linewidth=0.8)
    for at, each in zip(y, found, strict=True):
        if (d := each["difference"]) is not None:
            mean, low, high = (100 * d[key] for key in ("mean", "low", "high"))
            sure = low > 0 or high < 0
            right.errorbar(
                mean, at, xerr=[[mean - low], [high - mean]], fmt="o", markersize=4, capsize=3,
                color=_BLUE if sure else _GRAY,
            )  # fmt: skip
    least = max(1.0, *np.abs(right.get_xlim()))
    right.set_xlim(-least, least)
    right.set_xlabel(f"difference to {baseline}, points")
    right.set_title("95% interval; gray: holds 0", fontsize=8, color="0.35")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(drawn, epath.Path(path))


def accuracy_by_fraction(cells: Sequence[Json], name: str, path: Path) -> None:
    """Accuracy of every arm over the share of the data that it was trained on, with intervals.

    cells: of one encoder, a data fraction each.
    """
    rows = [(cell["fraction"], row) for cell in cells for row in cell["rows"]]
    labels = list(dict.fromkeys(row["label"] for _, row in rows if row["label"] == row["arm"]))
    drawn = new_figure(6.2, 3.4)
    axes = drawn.add_subplot()
    for i, (style, label) in enumerate(zip(_styles(len(labels)), labels, strict=True)):
        aside = 1.015 ** (i - (len(labels) - 1) / 2)  # bars beside each other, not on each other
        own = {100 * fraction: row["sets"] for fraction, row in rows if row["label"] == label}
        found = {share: sets[name] for share, sets in sorted(own.items())}
        means = np.array([100 * each["mean"] for each in found.values()])
        spans = np.array([each["interval"] for each in found.values()]).T
        axes.errorbar(
            aside * np.array(list(found)), means, yerr=np.abs(100 * spans - means), marker="o",
            markersize=4, linewidth=1.2, elinewidth=0.8, capsize=3, label=label, **style,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({100 * cell["fraction"] for cell in cells})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training pictures, % of those not held out")
    axes.set_ylabel(f"{name}: accuracy, %")
    axes.set_title("bars: 95% interval", fontsize=8, color="0.35")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(drawn, epath.Path(path))


def selection(choice: Json, path: Path) -> None:
    """Held-out accuracy of the arms a selection chose from."""
    names, scores = list(choice["scores"]), list(choice["scores"].values())
    drawn = new_figure(min(2.0 + 0.75 * len(names), 8.0), 2.9)
    axes = drawn.add_subplot()
    x = np.arange(len(names))
    means = [100 * float(np.mean(each)) for each in scores]
    axes.plot(x, means, "-", color=_GRAY, linewidth=1)
    for at, name, mean, each in zip(x, names, means, scores, strict=True):
        color = _ORANGE if name == choice["arm"] else _BLUE
        axes.plot(np.full(len(each), at), 100 * np.array(each), ".", color=color, alpha=0.5)
        axes.plot(at, mean, "o", color=color, markersize=6)
    turned = {"rotation": 25, "ha": "right"} if max(map(len, names)) > 7 else {}
    axes.set_xticks(x, names, **turned)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title(f"{choice['name']}: {choice['arm']} (small dots: seeds)", fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(drawn, epath.Path(path))


def learning_curves(curves: Sequence[Curves], path: Path) -> None:
    """Training loss by stage and, where there is one, the held-out curve; a style per row."""
    panels = [s for s in ("stage1", "stage2") if any(c.losses[s] for c in curves)]
    panels += ["held out"] * any(c.held_out for c in curves)
    columns = math.ceil(len(curves) / 16)  # of the legend: more names than that are higher than it
    drawn = new_figure(max(5.0, 3.6 * len(panels)) + 1.6 * columns, 3.4)
    styles = _styles(len(curves))
    for axes, panel in zip(np.ravel(drawn.subplots(1, len(panels))), panels, strict=True):
        for style, each in zip(styles, curves, strict=True):
            seeds = each.held_out if panel == "held out" else each.losses[panel]
            _draw_seeds(axes, seeds, each.label, style, smoothed=panel != "held out")
        axes.set_title(panel.replace("stage", "stage "), fontsize=9)
        axes.set_xlabel("update")
        axes.set_ylabel("accuracy, %" if panel == "held out" else "loss (nats per token)")
        if panel != "held out":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize=8, ncols=columns
    )
    save(drawn, epath.Path(path))


def read_curves(comparison: Comparison, folder: Path, cell: Json) -> list[Curves]:
    """The curves of a cell's arms, from the runs' metrics.jsonl and held-out results."""
    found: list[Curves] = []
    drawn: set[str] = set()
    settings = comparison.settings
    steps = [*range(settings.eval_every, settings.stage2.steps, settings.eval_every or 1)]
    for row in cell["rows"]:
        if row["arm"] in drawn:  # a selection chose an arm that has a row of its own
            continue
        drawn.add(row["arm"])
        runs = [Run(cell["encoder"], cell["fraction"], s, row["arm"]) for s in row["seeds"]]
        losses = {
            stage: [
                {line["step"]: line["loss"] for line in lines}
                for run in runs
                if (lines := read_lines(run.folder(folder) / stage / metrics.FILE))
            ]
            for stage in ("stage1", "stage2")
        }
        held_out = []
        for run in runs if settings.eval_every else ():
            files = {step: result_name(f"{HELD_OUT}_{step}") for step in steps}
            files[settings.stage2.steps] = result_name(HELD_OUT)
            workdir = run.workdir(folder)
            held_out.append(
                {
                    step: 100 * read_json(workdir / name)["overall"]["exact_match"]
                    for step, name in files.items()
                    if (workdir / name).is_file()
                }
            )
        found.append(Curves(row["label"], losses, held_out))
    return found


def _draw_seeds(
    axes: Any, seeds: list[Points], label: str, style: dict[str, Any], smoothed: bool
) -> None:
    """The mean over seeds, and every seed faintly."""
    if not seeds:
        return
    steps = sorted(set.intersection(*(set(points) for points in seeds)))
    values_SxN = np.array([[points[step] for step in steps] for points in seeds])
    if smoothed:
        values_SxN = np.stack([smooth(values_N) for values_N in values_SxN])
    for values_N in values_SxN if len(seeds) > 1 else ():
        axes.plot(steps, values_N, **style, linewidth=0.6, alpha=0.35)
    marker = None if smoothed else "o"
    mean_N = values_SxN.mean(axis=0)
    axes.plot(steps, mean_N, **style, marker=marker, linewidth=1.5, markersize=3, label=label)


def _styles(count: int) -> list[dict[str, Any]]:
    """Ten colors, then the same ten dashed, dotted and so on: 40 lines that can be told apart."""
    from matplotlib import colormaps

    dashes = ("-", "--", ":", "-.")
    return [
        {"color": colormaps["tab10"](i % 10), "linestyle": dashes[i // 10 % len(dashes)]}
        for i in range(count)
    ]
