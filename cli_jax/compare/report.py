"""Everything that is written when runs are finished: results.json, results.md and figures."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from cli_jax.compare import plots, protocol
from cli_jax.compare.config import Comparison, from_config
from cli_jax.compare.contrasts import contrasts, open_contrasts
from cli_jax.compare.runs import Run
from cli_jax.compare.summary import summarize
from cli_jax.compare.table import cell_name, markdown
from cli_jax.experiment import ConfigError
from cli_jax.output import write_file, write_json

FIGURES = "figures"


def report(folder: Path, resample: str = "") -> list[Path]:
    """Writes the report of what is finished in a comparison's folder; returns its files.

    resample: see Comparison; ConfigError if it is no regular expression.
    """
    fixed = protocol.read(folder)
    try:
        re.compile(resample)
    except re.error as error:
        raise ConfigError(f"--resample={resample!r} is no regular expression: {error}") from None
    comparison = dataclasses.replace(from_config(fixed["config"], folder), resample=resample)
    results = summarize(comparison, folder, fixed)
    results["contrasts"] = contrasts(comparison, folder)
    results["open_contrasts"] = open_contrasts(comparison, results["contrasts"])
    figures = {
        cell_name(cell): _draw(comparison, folder, results, cell) for cell in results["cells"]
    }
    for encoder in comparison.settings.encoders:
        own = [cell for cell in results["cells"] if cell["encoder"] == encoder.name]
        figures[cell_name(own[-1])] += _draw_fractions(folder, own)
    write_json(folder / "results.json", results)
    write_file(folder / "results.md", markdown(results, figures))
    drawn = [folder / path for each in figures.values() for _, path in each]
    return [folder / "results.md", folder / "results.json", *drawn]


def _draw_fractions(folder: Path, cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, path) of the figures over all data fractions of an encoder, if there are several."""
    drawn = []
    with_rows = [cell for cell in cells if cell["rows"]]
    for name in with_rows[0]["rows"][0]["sets"] if len(with_rows) > 1 else ():
        place = Path(FIGURES) / cell_name(cells[-1]) / f"fractions_{name}.png"
        plots.accuracy_by_fraction(with_rows, name, folder / place)
        drawn.append((f"Accuracy on {name} by data fraction", str(place)))
    return drawn


def _draw(
    comparison: Comparison, folder: Path, results: dict[str, Any], cell: dict[str, Any]
) -> list[tuple[str, str]]:
    """(title, path) of the figures of one encoder and data fraction."""
    place = Path(FIGURES) / cell_name(cell)
    (folder / place).mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, str]] = []

    def target(title: str, name: str) -> Path:
        drawn.append((title, str(place / name)))
        return folder / place / name

    if not cell["rows"]:
        return []
    for name in cell["rows"][0]["sets"]:
        path = target(f"Accuracy on {name}", f"accuracy_{name}.png")
        plots.accuracy_bars(cell["rows"], name, results["baseline"], path)
    for choice in cell["selections"]:
        slug = "_".join(choice["name"].split())
        plots.selection(choice, target(choice["name"], f"selection_{slug}.png"))
    curves = plots.read_curves(comparison, folder, cell)
    plots.learning_curves(curves, target("Learning curves", "curves.png"))
    for row in cell["rows"]:
        run = Run(cell["encoder"], cell["fraction"], comparison.settings.seeds[0], row["arm"])
        gates = run.workdir(folder) / "gates" / "gates.png"
        if gates.is_file() and row["label"] == row["arm"]:
            shutil.copyfile(gates, target(f"Gates of {row['arm']}", f"gates_{row['arm']}.png"))
    return drawn
