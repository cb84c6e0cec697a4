"""What finished runs have answered, question by question."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cli_jax.compare.config import HELD_OUT, Comparison, EvalSetConfig
from cli_jax.compare.runs import Run, predictions_name, result_name
from cli_jax.compare.splits import scenes_of
from cli_jax.experiment import ConfigError
from cli_jax.output import read_json
from cli_jax.train.workdir import read_lines


@dataclasses.dataclass(frozen=True)
class Answers:
    """Correctness [S, Q] by run and question, and what the questions are about."""

    correct_SxQ: np.ndarray
    scenes: list[str]
    categories: list[str]


def read_answers(
    comparison: Comparison, folder: Path, runs: Sequence[Run], eval_set: EvalSetConfig
) -> Answers:
    """The answers of finished runs to the questions of a set, in the file's order."""
    file = comparison.file_of(eval_set)
    scenes, categories = scenes_of(folder, file)
    scenes = [re.sub(comparison.resample, "", scene) for scene in scenes]
    wanted = [i for i, c in enumerate(categories) if c in (eval_set.categories or categories)]
    rows = []
    for run in runs:
        path = run.workdir(folder) / predictions_name(file)
        lines = read_lines(path)
        if [line["category"] for line in lines] != categories:
            raise ConfigError(f"{path} does not answer the questions of {eval_set.path}")
        rows.append([float(lines[i]["correct"]) for i in wanted])
    return Answers(np.array(rows), [scenes[i] for i in wanted], [categories[i] for i in wanted])


def unasked(comparison: Comparison, folder: Path, runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """By evaluation file and results file of a run: how many rows could not be asked, if any.

    They count as wrong. Where the numbers differ, a picture could not be read for a moment, or an
    arm's prompts are too long: that would look like a difference between arms.
    """
    found: dict[str, dict[str, int]] = {}
    held_out = (HELD_OUT,) if comparison.base.data.held_out else ()
    for name in (*comparison.eval_files, *held_out):
        paths = [run.workdir(folder) / result_name(name) for run in runs]
        counts = {
            str(path.relative_to(folder)): len(read_json(path)["bad_rows"])
            for path in paths
            if path.is_file()
        }
        if any(counts.values()):
            found[name] = counts
    return found


def is_finished(comparison: Comparison, folder: Path, run: Run) -> bool:
    """Whether a run has answered every evaluation file."""
    workdir = run.workdir(folder)
    names = [*comparison.eval_files, *([HELD_OUT] if comparison.base.data.held_out else [])]
    return all((workdir / result_name(name)).is_file() for name in names)
