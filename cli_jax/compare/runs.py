"""One run of a comparison: both stages and the answers, each step done once and kept on disk.

A run's folder holds log.txt and a workdir per stage, as train.py leaves them, with trained.json
when the stage is finished and results_NAME.json for every file of questions it has answered. A run
that diverged holds failed.json and is not tried again until it is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cli_jax.analysis.gates import analyze_gates
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.compare.config import HELD_OUT, CompareConfig, Comparison, StageConfig
from cli_jax.compare.progress import Progress
from cli_jax.compare.splits import eval_file, train_sources
from cli_jax.data import DataError, pipeline
from cli_jax.dryrun import flops
from cli_jax.evaluate.run import evaluate
from cli_jax.evaluate.workdir import open_run
from cli_jax.experiment import ConfigError, Experiment, load, to_dict
from cli_jax.fusion import registry
from cli_jax.output import write_json
from cli_jax.train import goodput
from cli_jax.train.checkpoint import FOLDER as CHECKPOINTS
from cli_jax.train.loop import Result, train
from cli_jax.train.run import open_data
from cli_jax.train.state import flatten
from cli_jax.train.workdir import read_lines

TRAINED = "trained.json"
FAILED = "failed.json"
STAGES = ("stage1", "stage2")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one arm."""

    encoder: str
    fraction: float
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, {self.encoder}, {self.fraction:.0%} of the data"

    def folder(self, root: Path) -> Path:
        return root / "runs" / self.encoder / f"{self.fraction:g}" / self.arm / f"seed_{self.seed}"

    def workdir(self, root: Path) -> Path:
        """That of stage 2, whose parameters answer the questions."""
        return self.folder(root) / STAGES[1]


def plan(settings: CompareConfig) -> list[Run]:
    """All runs; every arm of a seed before the next seed, so that what is there can be compared."""
    return [
        Run(encoder.name, fraction, seed, arm.name)
        for encoder in settings.encoders
        for fraction in settings.fractions
        for seed in settings.seeds
        for arm in settings.arms
    ]


def stages(comparison: Comparison, root: Path, run: Run) -> list[tuple[Path, Experiment]]:
    """The workdir and the experiment of every stage that has any steps, in order.

    All arms get the same encoder, data in the same order, seed and steps. The first stage starts
    from the encoder, the base's `init_from` and otherwise from the seed, a second one from it.
    """
    settings, found = comparison.settings, []
    encoder = next(each for each in settings.encoders if each.name == run.encoder).path
    start: dict[str, Any] = {
        "tower_from": _located(encoder),
        "init_from": _located(comparison.base.init_from),
    }
    for name in STAGES:
        stage: StageConfig = getattr(settings, name)
        if not stage.steps:
            continue
        experiment = comparison.experiment(run.arm, stage)
        data = dataclasses.replace(
            experiment.data, train=train_sources(comparison, root, run.fraction)
        )
        workdir = run.folder(root) / name
        found.append((workdir, dataclasses.replace(experiment, data=data, seed=run.seed, **start)))
        start = {"tower_from": "", "init_from": str(workdir)}
    return found


def _located(source: str) -> str:
    """A path that means the same from anywhere; a hub id, or nothing, stays as it is."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def is_trained(workdir: Path, experiment: Experiment) -> bool:
    """Whether a stage is finished; ConfigError if its folder holds one with another config."""
    if (workdir / "config.json").is_file():
        there, here = to_dict(load(workdir)), to_dict(experiment)
        if different := sorted(key for key in here if there[key] != here[key]):
            raise ConfigError(
                f"{workdir} holds a training with another config.{different[0]}: give a new "
                "--output folder"
            )
    return (workdir / TRAINED).is_file()


def train_stage(workdir: Path, experiment: Experiment, progress: Progress) -> None:
    """Trains a stage, or goes on; a finished one is left alone. KeyboardInterrupt if stopped."""
    if is_trained(workdir, experiment):
        return
    with logged(workdir.parent), contextlib.closing(open_data(experiment)) as data:
        result = train(experiment, str(workdir), data, watchers=(progress.done,))
        books = pipeline.report(data.get_state())
    if not result.complete:
        progress.say("stopped and saved: the same command goes on from there")
        raise KeyboardInterrupt
    samples = {key: books[key] for key in ("drawn", "skipped_rows", "too_long_rows")}
    write_json(workdir / TRAINED, {"samples": samples, **_cost(result, workdir)})


def answer(comparison: Comparison, root: Path, run: Run, names: Sequence[str]) -> None:
    """Asks the finished run every file of questions (HELD_OUT, or one of eval_files) once."""
    workdir = run.workdir(root)
    missing = [name for name in names if not (workdir / result_name(name)).is_file()]
    if not missing:
        return
    with logged(run.folder(root)):
        opened = open_run(workdir)
        with opened.context():
            for name in missing:
                _evaluate(opened, comparison, root, name, workdir, result_name(name))


def draw_gates(comparison: Comparison, root: Path, run: Run) -> None:
    """The mean gates on the first evaluation set, in gates/, of an arm that has gates."""
    workdir = run.workdir(root)
    model = load(workdir).model
    if (workdir / "gates.json").is_file():
        return
    if not registry.of(model).gated_taps(model.fusion, model.vision):
        return
    path, image_root = eval_file(comparison, root, next(iter(comparison.eval_files)))
    with logged(run.folder(root)):
        opened = open_run(workdir)
        with opened.context():
            try:
                found = analyze_gates(
                    opened.model,
                    opened.params,
                    opened.experiment,
                    path,
                    image_root,
                    workdir / "gates",
                )
                names = [file.name for file in found.written if file.suffix == ".png"]
                drawn: dict[str, Any] = {"written": names, "left_out": found.left_out}
            except AnalysisError as error:  # e.g. questions without pictures
                drawn = {"written": [], "left_out": {}, "problem": str(error)}
    write_json(workdir / "gates.json", drawn)


def answer_along_the_way(comparison: Comparison, root: Path, run: Run) -> None:
    """The held-out curve: asks the checkpoint of every `eval_every` updates, then removes it."""
    workdir, every = run.workdir(root), comparison.settings.eval_every
    last = comparison.settings.stage2.steps
    for step in range(every, last, every) if every else ():
        name = result_name(f"{HELD_OUT}_{step}")
        if not (workdir / name).is_file():
            with logged(run.folder(root)):
                opened = open_run(workdir, step)
                with opened.context():
                    _evaluate(opened, comparison, root, HELD_OUT, workdir, name)
        shutil.rmtree(workdir / CHECKPOINTS / str(step), ignore_errors=True)


def result_name(name: str) -> str:
    return f"results_{name}.json"


def predictions_name(name: str) -> str:
    return f"predictions_{name}.jsonl"


def _evaluate(
    opened: Any, comparison: Comparison, root: Path, name: str, workdir: Path, file: str
) -> None:
    path, image_root = eval_file(comparison, root, name)
    results = evaluate(
        opened.model,
        opened.params,
        opened.experiment,
        path,
        image_root,
        workdir,
        step=opened.step,
        name=file,
    )
    bad = results["bad_rows"]
    if len(bad) == results["overall"]["n"]:
        (workdir / file).unlink()
        raise DataError(f"no question of {path} can be asked: {bad[0]['reason']}")


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """What is printed meanwhile goes to the folder's log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "log.txt").open("a", buffering=1))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        yield


def _cost(result: Result, workdir: Path) -> dict[str, Any]:
    """What the strategy costs: parameters, FLOPs of a row, seconds of an update once warm."""
    experiment, rates = result.setup.experiment, result.setup.rates
    sizes = {path: leaf.size for path, leaf in flatten(result.setup.state.params).items()}
    row, rows = flops.row_of(experiment), experiment.data.batch_size
    update = flops.step(experiment.model, row, rows, rates)
    return {
        "steps": experiment.total_steps,
        "parameters": sum(sizes.values()),
        "trained_parameters": sum(sizes[path] for path, rate in rates.items() if rate is not None),
        "forward_flops": sum(flops.forward(experiment.model, row).values()),
        "update_flops": sum(update.values()) / rows,
        "seconds_per_update": _seconds_per_update(workdir),
    }


def _seconds_per_update(workdir: Path) -> float | None:
    """Median over the logged windows, waiting for data included; the first, still cold, counts
    only if it is the only one."""
    lines = read_lines(workdir / goodput.LINES)
    windows = [
        (line["seconds"].get("step", 0.0) + line["seconds"].get("data", 0.0))
        / (line["step"] - before["step"])
        for before, line in itertools.pairwise(lines)
        if line["run"] == before["run"] and line["step"] > before["step"]
    ]
    return statistics.median(windows[1:] or windows) if windows else None
