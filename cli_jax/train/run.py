"""A whole run: data, training, then the evaluation and the pictures that the config asks for.

With `config.objective=siglip` the vision tower is trained by itself; it answers nothing, and its
held-out pictures are measured on the way.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cli_jax import demo
from cli_jax.analysis import gates, plots
from cli_jax.analysis.prompts import AnalysisError
from cli_jax.data import pipeline
from cli_jax.evaluate.run import evaluate
from cli_jax.experiment import ConfigError, Experiment, locate
from cli_jax.fusion import registry
from cli_jax.pretrain.held_out import HeldOut
from cli_jax.text import check_vocabulary, load_tokenizer
from cli_jax.train import metrics
from cli_jax.train.loop import AtSave, rows_per_process, say, train
from cli_jax.train.setup import Setup
from cli_jax.train.state import Params
from cli_jax.train.workdir import prepare


def run(experiment: Experiment, workdir: str) -> bool:
    """Trains, or goes on training, in `workdir`; True when done, False when it was interrupted.

    A finished run is evaluated on `experiment.eval.path`, if there is one, into the same folder,
    with pictures of the loss and of the gates where matplotlib is installed.
    """
    folder = prepare(workdir)  # first of all: nothing is worth reading if it cannot be written
    experiment = locate(experiment, workdir)
    if demo.prepare(experiment.data):
        say(f"made the data set {experiment.data.prepare!r} in {experiment.data.root}")
    _check_eval(experiment)
    with contextlib.closing(open_data(experiment)) as data:
        result = train(experiment, workdir, data, at_save=_measure(experiment, folder))
        books = pipeline.report(data.get_state())
    say(
        f"data: {books['drawn']:,} samples drawn, {books['skipped_rows']} unusable and "
        f"{books['too_long_rows']} too long rows dropped, {books['fill_tokens']:.1%} of the "
        f"tokens and {books['fill_visual']:.1%} of the visual slots filled"
    )
    step = int(result.state.step)
    if not result.complete:
        say(f"interrupted and saved after step {step}: the same command goes on from there")
        return False
    setup, params = result.setup, result.state.params
    del result  # the optimizer's state is not needed any more
    if experiment.eval.path:
        _evaluate(setup, params, workdir, step)
    _draw(setup, params, workdir)
    return True


def open_data(experiment: Experiment) -> pipeline.Loader:
    """This process's batches of a located experiment, in the order of its seed; close it."""
    model = experiment.model
    tokenizer = load_tokenizer(experiment.data.tokenizer)
    check_vocabulary(tokenizer, model.text.vocab_size)
    return pipeline.make_loader(
        experiment.data,
        model.image,
        model.vision,
        seed=experiment.seed,
        rows_per_process=rows_per_process(experiment),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        extras=experiment.extras,
        prompt_context=registry.of(model).needs_prompt_context(model.fusion),
        tokenizer=tokenizer,
    )


def _measure(experiment: Experiment, folder: epath.Path) -> AtSave | None:
    if experiment.objective == "siglip" and experiment.data.held_out:
        return HeldOut(experiment, folder)
    return None


def _check_eval(experiment: Experiment) -> None:
    path = experiment.eval.path
    if path and experiment.objective == "siglip":
        raise ConfigError(
            f"config.eval.path={path} asks questions, which config.objective=siglip does not learn "
            f"to answer: leave it empty; what config.data.held_out keeps back is measured"
        )
    if path and not Path(path).is_file():
        raise ConfigError(f"config.eval.path={path} does not exist; empty means no evaluation")


def _asked(setup: Setup, params: Params, workdir: str) -> tuple[Any, ...]:
    """The model, the evaluation's questions and where to write, as `evaluate` and gates take it."""
    experiment = setup.experiment
    questions = experiment.eval.path, experiment.eval.image_root
    return setup.model, params, experiment, *questions, workdir


def _evaluate(setup: Setup, params: Params, workdir: str, step: int) -> None:
    settings = setup.experiment.eval
    with setup.context():
        scores = evaluate(*_asked(setup, params, workdir), step=step)
    overall = scores["overall"]
    say(
        f"exact match {overall['exact_match']:.1%} of {overall['n']} questions of {settings.path} "
        f"(the commonest answer: {overall['chance']['exact_match']:.1%})"
    )


def _draw(setup: Setup, params: Params, workdir: str) -> None:
    """Draws the loss curve, and the gates of the evaluation's pictures if the model has gates."""
    try:
        plots.require_matplotlib()
    except plots.PlotError as error:
        say(f"no pictures of the loss and the gates: {error}")
        return
    if jax.process_index() == 0:
        per = "picture" if setup.experiment.objective == "siglip" else "token"
        plots.loss_curve(Path(workdir) / metrics.FILE, Path(workdir) / "loss.png", per)
    settings, model = setup.experiment.eval, setup.experiment.model
    if settings.path and registry.of(model).gated_taps(model.fusion, model.vision):
        try:
            with setup.context():
                gates.analyze_gates(*_asked(setup, params, workdir), limit=settings.limit)
        except AnalysisError as error:  # e.g. questions without pictures
            say(f"no picture of the gates: {error}")
