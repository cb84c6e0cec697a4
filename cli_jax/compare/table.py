"""`results.md`: what was compared, how, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

_NOTES = """\
± is the standard deviation over seeds. A difference is arm - {baseline} on the same questions, in \
percentage points, with a 95% interval from {draws:,} bootstrap draws that resample seeds and \
{scenes} (not questions). With few seeds such intervals are too \
narrow, and with one they say nothing about seeds. Where the interval holds 0, no difference was \
shown.

FLOPs are those of one row's forward pass, counted from shapes (cli_jax/dryrun/flops.py); time is \
the median of stage 2's updates on {devices}, waiting for data included: runs that share a machine \
slow each other."""


def markdown(results: Json, figures: dict[str, list[tuple[str, str]]]) -> str:
    """The report's text. figures: of each cell's name, (title, path relative to the report)."""
    blocks = [f"# {results['name']}", _header(results)]
    if results["contrasts"]:
        blocks += ["## Contrasts", _contrasts_table(results["contrasts"])]
    if results["open_contrasts"]:
        blocks.append(f"**Not finished: {'; '.join(results['open_contrasts'])}.**")
    for cell in results["cells"]:
        blocks += _cell(results, cell, figures.get(cell_name(cell), []))
    return "\n\n".join(blocks) + "\n"


def cell_name(cell: Json) -> str:
    """Names an encoder and data fraction, also in file names."""
    return f"{cell['encoder']}_{cell['fraction']:g}"


def percent(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def _header(results: Json) -> str:
    steps, splits = results["steps"], results["splits"]
    held_out = splits["evals"].get("held_out", {"pictures": 0})["pictures"]
    lines = [
        f"Steps: {steps['stage1']:,} in stage 1, {steps['stage2']:,} in stage 2, of "
        f"{results['batch_size']} rows. Seeds: {', '.join(map(str, results['seeds']))}. "
        f"Held-out training pictures: {held_out:,}.",
        f"Fixed beforehand in protocol.json, {results['protocol'][:12]}; code "
        f"{', '.join(results['revisions'])}.",
    ]
    if len(results["revisions"]) > 1:
        lines.append("**The code changed between runs: they are not strictly comparable.**")
    for file, counts in results["unasked"].items():
        lines.append(_unasked(file, counts))
    notes = _NOTES.format(
        baseline=results["baseline"],
        draws=results["draws"],
        scenes=f"scenes by their names without `{found}`"
        if (found := results["resample"])
        else "scenes",
        devices=" and ".join(results["devices"]) or "nothing yet",
    )
    return "\n".join(lines) + "\n\n" + notes


def _unasked(file: str, counts: dict[str, int]) -> str:
    """What to think of rows that could not be asked, by results file of a run."""
    least, most = min(counts.values()), max(counts.values())
    if least == most:
        return f"{most:,} rows of {file} could not be asked and count as wrong in all runs."
    worst = max(counts, key=lambda path: counts[path])
    return (
        f"**{least:,} to {most:,} rows of {file} could not be asked, by run, and count as wrong: "
        f"runs are not comparable. See bad_rows in {worst}; remove such a file to ask again.**"
    )


def _cell(results: Json, cell: Json, figures: list[tuple[str, str]]) -> list[str]:
    pictures = results["splits"]["train"][f"{cell['fraction']:g}"]["pictures"]
    blocks = [f"## Encoder {cell['encoder']}, {cell['fraction']:.0%} of the data"]
    blocks.append(f"{pictures:,} training pictures.")
    if cell["unfinished"]:
        blocks.append(f"**Not finished: {', '.join(cell['unfinished'])}.**")
    blocks += [f"**Failed: {each['run']}**: {each['error']}" for each in cell["failed"]]
    if different := _other_samples(cell["rows"]):
        blocks.append(
            f"**{', '.join(different)}: other samples than {cell['rows'][0]['label']} saw, so not "
            f"comparable (`samples` in results.json; rows may be too long for some arms).**"
        )
    if cell["rows"]:
        blocks.append(_asked(cell["rows"][0]["sets"]))
        blocks.append(_main_table(results, cell["rows"]))
        for name in cell["rows"][0]["sets"]:
            if len(cell["rows"][0]["sets"][name]["categories"]) > 1:
                blocks += [f"### {name} by category", _category_table(cell["rows"], name)]
    for choice in cell["selections"]:
        blocks += [
            f"### {choice['name']}",
            f"Chosen on held-out training pictures, accuracy there: **{choice['arm']}**.",
            _table(
                ["arm", "mean", "by seed"],
                [
                    [arm, percent(sum(by_seed) / len(by_seed)), ", ".join(map(percent, by_seed))]
                    for arm, by_seed in choice["scores"].items()
                ],
            ),
        ]
    blocks += [f"![{title}]({path})" for title, path in figures]
    if cell["rows"]:
        blocks += ["### What the arms change", _changes_table(cell["rows"])]
    return blocks


def _asked(sets: Json) -> str:
    """How much the intervals of a set rest on: it is scenes that they resample."""
    return "; ".join(
        f"{name}: {found['questions']:,} questions about {found['resampled']:,} scenes"
        for name, found in sets.items()
    )


def _contrasts_table(contrasts: Sequence[Json]) -> str:
    body = [
        [
            f"{each['contrast']}, {each['fraction']:.0%} of the data",
            f"{each['encoder']} ({each['pairs']})",
            *map(_difference, each["sets"].values()),
        ]
        for each in contrasts
    ]
    return _table(["contrast", "encoder (pairs of runs)", *contrasts[0]["sets"]], body)


def _other_samples(rows: Sequence[Json]) -> list[str]:
    """Labels of the arms that drew or dropped other numbers of samples than the first, by seed."""
    seen = [dict(zip(row["seeds"], row["samples"], strict=True)) for row in rows]
    return [
        row["label"]
        for row, own in zip(rows, seen, strict=True)
        if any(own[seed] != seen[0][seed] for seed in own.keys() & seen[0].keys())
    ]


def _main_table(results: Json, rows: Sequence[Json]) -> str:
    names = list(rows[0]["sets"])
    head = ["arm"]
    for name in names:
        head += [f"{name}, %", f"{name} − {results['baseline']}"]
    has_held_out = "held_out" in rows[0]
    head += ["held out, %"] * has_held_out
    head += ["trained", "parameters", "MFLOPs", "ms/update"]
    body = []
    for row in rows:
        seeds = len(row["seeds"])
        of = len(results["seeds"])
        line = [row["label"] + (f" ({seeds} of {of} seeds)" if seeds < of else "")]
        for name in names:
            line += [_mean(row["sets"][name]), _difference(row["sets"][name]["difference"])]
        line += [_mean(row["held_out"])] * has_held_out
        seconds = row["seconds_per_update"]
        line += [
            _trained(row),
            f"{row['parameters']:,}",
            f"{row['forward_flops'] / 1e6:,.1f}",
            f"{1000 * seconds:,.0f}" if seconds else "–",
        ]
        body.append(line)
    return _table(head, body)


def _category_table(rows: Sequence[Json], name: str) -> str:
    categories = rows[0]["sets"][name]["categories"]
    head = ["arm", *(f"{c} ({found['questions']:,})" for c, found in categories.items())]
    body = []
    for row in rows:
        cells = []
        for category in categories:
            found = row["sets"][name]["categories"][category]
            difference = _difference(found["difference"])
            cells.append(_mean(found) + (f"<br>{difference}" if found["difference"] else ""))
        body.append([row["label"], *cells])
    return _table(head, body)


def _changes_table(rows: Sequence[Json]) -> str:
    body = [[row["label"], f"`{json.dumps(row['changes'])}`"] for row in rows]
    return _table(["arm", "changes of the base config"], body, numbers=False)


def _trained(row: Json) -> str:
    """Trained parameters, of both stages if there are two."""
    first = row.get("stage1_trained_parameters")
    return (f"{first:,}, then " if first else "") + f"{row['trained_parameters']:,}"


def _mean(found: Json) -> str:
    spread = "" if found["std"] is None else f" ± {percent(found['std'])}"
    return percent(found["mean"]) + spread


def _difference(found: Json | None) -> str:
    if found is None:
        return ""
    low, high = percent(found["low"], sign=True), percent(found["high"], sign=True)
    return f"{percent(found['mean'], sign=True)} [{low}, {high}]"


def _table(head: Sequence[str], body: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    rows = (head, rule, *body)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )
