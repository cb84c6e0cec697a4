"""The whole comparison: fix the protocol, train and ask every run, choose, report."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli_jax import demo
from cli_jax.analysis.plots import require_matplotlib
from cli_jax.compare import protocol, splits
from cli_jax.compare.claims import claim, claimed, in_turn
from cli_jax.compare.config import HELD_OUT, Comparison, from_config
from cli_jax.compare.progress import Progress
from cli_jax.compare.report import report
from cli_jax.compare.runs import (
    FAILED,
    Run,
    answer,
    answer_along_the_way,
    draw_gates,
    is_trained,
    plan,
    result_name,
    stages,
    train_stage,
)
from cli_jax.compare.summary import choose
from cli_jax.experiment import ConfigError
from cli_jax.hf.error import ConversionError
from cli_jax.output import read_json, writable_folder, write_json
from cli_jax.train.checkpoint import CheckpointError
from cli_jax.train.initial import load_initial
from cli_jax.train.loop import TrainingError
from cli_jax.train.setup import make_setup


def compare(config: Mapping[str, Any], output: str | Path) -> list[Path]:
    """Runs what is not finished yet of a comparison in `output`; returns the report's files.

    Several processes may do so at once: each run is done by one of them, and the last one to end
    reports them all. Raises ConfigError if the folder was begun with another config, and
    KeyboardInterrupt when stopped, after saving: the same call goes on from there.
    """
    require_matplotlib()
    folder = Path(writable_folder(output)).absolute()
    comparison = from_config(config, folder)
    with in_turn(folder):
        _fix(comparison, folder)
    _run_all(comparison, folder)
    return redraw(folder)


def _fix(comparison: Comparison, folder: Path) -> None:
    if demo.prepare(comparison.base.data):
        print(f"made the data set {comparison.base.data.prepare!r} in {comparison.base.data.root}")
    cut = splits.cut(comparison)
    if not (folder / protocol.FILE).is_file():
        _check_setups(comparison, folder)
    fixed = protocol.fix(comparison, cut.report, folder)
    splits.write(cut, folder)
    print(f"protocol {fixed['hash'][:12]} in {folder / protocol.FILE}")


def redraw(output: str | Path, resample: str = "") -> list[Path]:
    """The report of what is there so far; trains and asks nothing. resample: see `report`."""
    require_matplotlib()
    folder = Path(output).absolute()
    protocol.read(folder)  # before a lock is left in some other folder
    with in_turn(folder):
        return report(folder, resample)


def _run_all(comparison: Comparison, folder: Path) -> None:
    settings = comparison.settings
    steps = settings.stage1.steps + settings.stage2.steps
    runs = plan(settings)
    others = list(runs)
    with (
        Progress(steps * len(runs), _finished_updates(comparison, folder, *runs)) as progress,
        contextlib.closing(claimed(runs, folder)) as mine,
    ):
        for run in mine:
            name = f"run {runs.index(run) + 1}/{len(runs)}: {run}"
            progress.begin(name)
            progress.reached(_finished_updates(comparison, folder, *runs))
            others.remove(run)
            failed = run.folder(folder) / FAILED
            if not failed.is_file():
                try:
                    _run(comparison, folder, run, name, progress)
                except TrainingError as error:  # it diverged, which says something about its arm
                    write_json(failed, {"run": str(run), "error": str(error)})
            if failed.is_file():
                progress.fail(steps - _finished_updates(comparison, folder, run))
                progress.say(f"{run} FAILED, see {failed}: remove it to try again")
        for run in others:
            progress.say(f"another process is at {run}: the last one to end reports all runs")
        for encoder in settings.encoders:
            for fraction in settings.fractions:
                for choice in choose(comparison, folder, encoder.name, fraction):
                    progress.say(f"{choice.name}, by held-out pictures: {choice.arm}")
                    for seed in settings.seeds:
                        run = Run(encoder.name, fraction, seed, choice.arm)
                        progress.begin(f"asking {run}")
                        with claim(run, folder) as free:
                            if free:
                                answer(comparison, folder, run, list(comparison.eval_files))


def _run(comparison: Comparison, folder: Path, run: Run, what: str, progress: Progress) -> None:
    """Trains and asks one run, and says how it did; what is finished is left alone."""
    settings = comparison.settings
    names = [HELD_OUT] if comparison.base.data.held_out else []
    if comparison.arm(run.arm).reported:
        names += comparison.eval_files
    for workdir, experiment in stages(comparison, folder, run):
        progress.begin(f"{what}, {workdir.name}")
        train_stage(workdir, experiment, progress)
    workdir = run.workdir(folder)
    if all((workdir / result_name(name)).is_file() for name in names):
        new = False
    else:
        new = True
        progress.begin(f"{what}, asking")
        answer(comparison, folder, run, names)
    answer_along_the_way(comparison, folder, run)
    if run.seed == settings.seeds[0] and comparison.arm(run.arm).reported:
        draw_gates(comparison, folder, run)
    if new:
        scores = [
            (name, read_json(workdir / result_name(name))["overall"]["exact_match"])
            for name in names
        ]
        progress.say(f"{run}: " + ", ".join(f"{name} {score:.1%}" for name, score in scores))


def _finished_updates(comparison: Comparison, folder: Path, *runs: Run) -> int:
    """Updates of the runs' finished stages."""
    return sum(
        experiment.total_steps
        for run in runs
        for workdir, experiment in stages(comparison, folder, run)
        if is_trained(workdir, experiment)
    )


def _check_setups(comparison: Comparison, folder: Path) -> None:
    """Everything that shapes can tell is wrong with an arm is found before the first run.

    The same of encoders and of the model that all start from: one that is missing would be noted
    in the protocol as if it were there, and one that does not fit an arm would end every attempt.
    """
    settings = comparison.settings
    for arm in settings.arms:
        for stage in (settings.stage1, settings.stage2):
            if not stage.steps:
                continue
            try:
                make_setup(comparison.experiment(arm.name, stage))
            except ValueError as error:  # e.g. a layer that the towers do not have
                raise ConfigError(f"config.compare: the arm {arm.name!r}: {error}") from error
    for encoder in settings.encoders:
        run = Run(encoder.name, settings.fractions[0], settings.seeds[0], settings.baseline)
        load_initial(make_setup(stages(comparison, folder, run)[0][1]))
    others = [arm for arm in settings.arms if arm.name != settings.baseline]
    for arm in others if comparison.base.init_from else ():
        run = Run(settings.encoders[0].name, settings.fractions[0], settings.seeds[0], arm.name)
        try:
            load_initial(make_setup(stages(comparison, folder, run)[0][1]))
        except (CheckpointError, ConversionError) as error:
            raise ConfigError(f"config.compare: the arm {arm.name!r}: {error}") from error
