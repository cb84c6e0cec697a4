"""The numbers of a comparison, from what its runs have left: `results.json`. Needs no data."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.compare.answers import Answers, is_finished, read_answers, unasked
from cli_jax.compare.bootstrap import interval
from cli_jax.compare.config import HELD_OUT, Comparison
from cli_jax.compare.runs import FAILED, STAGES, TRAINED, Run, plan, result_name
from cli_jax.output import read_json

Json = dict[str, Any]
COSTS = ("parameters", "trained_parameters", "forward_flops", "update_flops")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a selection has chosen, with the held-out accuracy of every arm by seed."""

    name: str
    arm: str
    scores: dict[str, list[float]]


def choose(comparison: Comparison, folder: Path, encoder: str, fraction: float) -> list[Choice]:
    """The best arm of every selection by its mean held-out accuracy; the first of equals.

    A selection whose arms are not all finished is left out.
    """
    found = []
    for select in comparison.settings.select:
        scores: dict[str, list[float]] = {}
        for arm in select.arms:
            runs = [Run(encoder, fraction, seed, arm) for seed in comparison.settings.seeds]
            files = [run.workdir(folder) / result_name(HELD_OUT) for run in runs]
            if all(file.is_file() for file in files):
                scores[arm] = [read_json(file)["overall"]["exact_match"] for file in files]
        if len(scores) == len(select.arms):
            best = max(scores, key=lambda arm: statistics.mean(scores[arm]))
            found.append(Choice(select.name, best, scores))
    return found


def summarize(comparison: Comparison, folder: Path, protocol: Json) -> Json:
    """Everything a report needs. Arms without a finished seed are listed as `unfinished`."""
    settings = comparison.settings
    return {
        "name": comparison.base.name,
        "protocol": protocol["hash"],
        "revisions": _revisions(folder),
        "devices": sorted({run["devices"] for run in _run_files(folder)}),
        "baseline": settings.baseline,
        "seeds": list(settings.seeds),
        "steps": {"stage1": settings.stage1.steps, "stage2": settings.stage2.steps},
        "batch_size": comparison.base.data.batch_size,
        "eval_every": settings.eval_every,
        "splits": protocol["splits"],
        "encoders": protocol["encoders"],
        "draws": settings.draws,
        "resample": comparison.resample,
        "unasked": unasked(comparison, folder, plan(settings)),
        "cells": [
            _cell(comparison, folder, encoder.name, fraction)
            for encoder in settings.encoders
            for fraction in settings.fractions
        ],
    }


def _cell(comparison: Comparison, folder: Path, encoder: str, fraction: float) -> Json:
    """All rows of one encoder and data fraction."""
    choices = choose(comparison, folder, encoder, fraction)
    arms = [(arm.name, arm.name) for arm in comparison.settings.arms if arm.reported]
    arms += [(f"{choice.name} ({choice.arm})", choice.arm) for choice in choices]
    rows = [_row(comparison, folder, encoder, fraction, label, arm) for label, arm in arms]
    return {
        "encoder": encoder,
        "fraction": fraction,
        "rows": [row for row in rows if row["seeds"]],
        "unfinished": [
            row["label"] for row in rows if len(row["seeds"]) < len(comparison.settings.seeds)
        ]
        + [
            select.name
            for select in comparison.settings.select
            if select.name not in {choice.name for choice in choices}
        ],
        "failed": [
            read_json(path)
            for path in sorted((folder / "runs" / encoder / f"{fraction:g}").glob(f"*/*/{FAILED}"))
        ],
        "selections": [dataclasses.asdict(choice) for choice in choices],
    }


def _row(
    comparison: Comparison, folder: Path, encoder: str, fraction: float, label: str, arm: str
) -> Json:
    settings = comparison.settings

    def runs_of(name: str) -> dict[int, Run]:
        """The finished runs of an arm by seed."""
        runs = {seed: Run(encoder, fraction, seed, name) for seed in settings.seeds}
        return {seed: run for seed, run in runs.items() if is_finished(comparison, folder, run)}

    own, base = runs_of(arm), runs_of(settings.baseline)
    row: Json = {
        "label": label,
        "arm": arm,
        "changes": dict(comparison.arm(arm).changes),
        "seeds": list(own),
    }
    if not own:
        return row
    costs = [read_json(run.workdir(folder) / TRAINED) for run in own.values()]
    row |= {name: costs[0][name] for name in COSTS}
    row["samples"] = [cost["samples"] for cost in costs]
    if settings.stage1.steps:
        first = next(iter(own.values())).folder(folder) / STAGES[0] / TRAINED
        row["stage1_trained_parameters"] = read_json(first)["trained_parameters"]
    times = [cost["seconds_per_update"] for cost in costs if cost["seconds_per_update"]]
    row["seconds_per_update"] = statistics.median(times) if times else None
    row["sets"] = {}
    for each in settings.evals:
        answers = read_answers(comparison, folder, list(own.values()), each)
        shared = [seed for seed in own if seed in base and arm != settings.baseline]
        pair = None
        if shared:
            pair = (
                read_answers(comparison, folder, [own[seed] for seed in shared], each),
                read_answers(comparison, folder, [base[seed] for seed in shared], each),
            )
        row["sets"][each.name] = _scores(answers, pair, settings.draws)
    if comparison.base.data.held_out:
        results = [read_json(run.workdir(folder) / result_name(HELD_OUT)) for run in own.values()]
        row["held_out"] = _spread([each["overall"]["exact_match"] for each in results])
    return row


def _scores(answers: Answers, pair: tuple[Answers, Answers] | None, draws: int) -> Json:
    """Accuracy of a set's questions, overall and by category, and the paired difference."""

    def of(chosen_Q: np.ndarray) -> Json:
        scenes = [answers.scenes[i] for i in np.flatnonzero(chosen_Q)]
        correct_SxQ = answers.correct_SxQ[:, chosen_Q]
        _, low, high = interval(correct_SxQ, scenes, draws=draws)
        found = _spread(correct_SxQ.mean(axis=1).tolist()) | {
            "questions": len(scenes),
            "resampled": len(set(scenes)),
            "interval": [low, high],
            "difference": None,
        }
        if pair:
            own, base = (each.correct_SxQ[:, chosen_Q] for each in pair)
            found["difference"] = interval(own - base, scenes, draws=draws)._asdict()
        return found

    categories = np.array(answers.categories)
    return of(np.ones(len(categories), bool)) | {
        "categories": {name: of(categories == name) for name in sorted(set(answers.categories))}
    }


def _spread(values: list[float]) -> Json:
    """Mean, sample standard deviation (None for one seed) and the values by seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": std, "by_seed": values}


def _run_files(folder: Path) -> list[Json]:
    return [read_json(path) for path in sorted((folder / "runs").glob("*/*/*/*/stage*/run.json"))]


def _revisions(folder: Path) -> list[str]:
    """The code that has trained the runs, and that has asked them."""
    trained = [(run["revision"], *run["earlier_revisions"]) for run in _run_files(folder)]
    files = (folder / "runs").glob("*/*/*/*/stage*/results_*.json")
    asked = [found["revision"] for found in map(read_json, files) if "revision" in found]
    return sorted({*itertools.chain(*trained), *asked})
