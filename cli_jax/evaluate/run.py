"""One evaluation: questions of a file -> answers -> scores, predictions, examples."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cli_jax.data import Sample, SampleSpec
from cli_jax.data.sources import image_root_of
from cli_jax.evaluate.metrics import METRICS
from cli_jax.evaluate.progress import progress_bar
from cli_jax.evaluate.prompts import (
    Question,
    load_prompts,
    open_pictures,
    prompt_spec,
    read_questions,
)
from cli_jax.evaluate.report import (
    Prediction,
    summarize,
    versions,
    write_predictions,
)
from cli_jax.evaluate.sheet import Example, contact_sheet, spread
from cli_jax.experiment import Experiment
from cli_jax.generate.buckets import batches
from cli_jax.generate.engine import Generator
from cli_jax.generate.sampling import Sampling
from cli_jax.image.errors import ImageError
from cli_jax.output import OutputError, writable_folder, write_json
from cli_jax.parallel.rules import SPLIT_BATCH
from cli_jax.text import Tokenizer, load_tokenizer, stop_ids
from cli_jax.train.workdir import git_revision

EXAMPLES = 24  # on the contact sheet


def evaluate(
    model: Any,
    params: Any,
    experiment: Experiment,
    path: str | Path,
    image_root: str | Path,
    output_dir: str | Path,
    *,
    step: int,
    blank: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    name: str = "results.json",
) -> dict[str, Any]:
    """Asks every question of a LLaVA-format file and writes what came of it.

    Writes `results.json`, `predictions.jsonl` and `examples.png` to `output_dir`; another `name`
    such as `results_blank.json` goes with `predictions_blank.jsonl` and `examples_blank.png`.
    Returns the contents of `results.json`. What is None is taken from `experiment.eval`; an empty
    `image_root` is the folder of `path`. `blank` replaces every picture by a gray one: a model that
    looks at its pictures falls to chance. Rows that cannot be asked count as wrong and are listed
    under `bad_rows`. Under a mesh (`jax.set_mesh`) the rows of a batch are split over its devices.
    Raises DataError for an unreadable file and OutputError for a folder that cannot be written to.
    """
    begun = time.perf_counter()
    defaults = experiment.eval
    limit = defaults.limit if limit is None else limit
    rows = whole_rows(batch_size or defaults.batch_size)
    new_tokens = max_new_tokens or defaults.max_new_tokens
    sampling = sampling or Sampling()
    root = image_root_of(path, image_root)
    files = _files(output_dir, name, path)
    if jax.process_index() == 0:
        files["results"].unlink(missing_ok=True)  # it must not stand for a run that fails

    questions = read_questions(path, limit)
    tokenizer = load_tokenizer(experiment.data.tokenizer)
    spec = prompt_spec(experiment, tokenizer, new_tokens)
    generator = Generator(
        model,
        params,
        stop_ids=stop_ids(tokenizer, experiment.data.template),
        pad_id=tokenizer.pad_id,
        max_new_tokens=new_tokens,
        sampling=sampling,
    )
    prompts = load_prompts(questions, root, spec, blank=blank)
    predictions, cut_off = _ask(generator, tokenizer, questions, prompts, rows, spec)
    results = {
        "experiment": experiment.name,
        "fusion": experiment.model.fusion_name,
        "step": step,
        "data": str(path),
        "image_root": root,
        "blank_images": blank,
        "limit": limit,
        "metrics": list(METRICS),
        **summarize(predictions),
        "bad_rows": [{"id": p.id, "reason": p.error} for p in predictions if p.error],
        "cut_off": cut_off,
        "generation": {
            "batch_size": rows,
            "max_new_tokens": new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "dtype": experiment.compute.dtype,
            "compilations": generator.compilations,
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "revision": git_revision(),
        "seconds": round(time.perf_counter() - begun, 2),
        "versions": versions(),
    }
    if jax.process_index() == 0:
        write_predictions(files["predictions"], predictions)
        _draw_examples(files["examples"], questions, predictions, root, spec, blank)
        write_json(files["results"], results)  # last: where it is, the evaluation is complete
    return results


def whole_rows(batch_size: int) -> int:
    """The batch size rounded up so that every device of the current mesh gets as many rows."""
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in SPLIT_BATCH)
    return -(-batch_size // shards) * shards


def _ask(
    generator: Generator,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    prompts: Iterator[tuple[int, Sample | str]],
    rows: int,
    spec: SampleSpec,
) -> tuple[list[Prediction], int]:
    """Predictions in the order of the questions, and how many answers were cut off."""
    texts, errors, cut_off = {}, {}, 0
    bar = progress_bar(len(questions), "evaluate")

    def usable() -> Iterator[tuple[int, Sample]]:
        for number, prompt in prompts:
            if isinstance(prompt, str):
                errors[number] = prompt
                bar.update()
            else:
                yield number, prompt

    with bar:
        for group in batches(usable(), rows, spec.vision, spec.extras):
            for number, completion in zip(
                group.numbers, generator(group.batch, group.numbers), strict=True
            ):
                texts[number] = tokenizer.decode(completion.ids).strip()
                cut_off += not completion.stopped
            bar.update(len(group.numbers))
    predictions = [
        Prediction(q.id, q.category, q.text, q.answer, texts.get(i, ""), errors.get(i, ""))
        for i, q in enumerate(questions)
    ]
    return predictions, cut_off


def _draw_examples(
    path: epath.Path,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    root: str,
    spec: SampleSpec,
    blank: bool,
) -> None:
    examples = []
    for i in spread(len(questions), EXAMPLES):
        try:
            images = open_pictures(questions[i], root, spec, blank=blank)
        except ImageError:
            images = []  # the row is bad, and its cell says so
        p = predictions[i]
        shown = p.error or p.prediction
        examples.append(Example(images, p.question, p.answer, shown, p.correct))
    contact_sheet(examples, path)


def _files(output_dir: str | Path, name: str, data: str | Path) -> dict[str, epath.Path]:
    """The three files of an evaluation, in a folder that can be written; none is `data`."""
    folder, stem = writable_folder(output_dir), Path(name).stem
    tail = stem.removeprefix("results") if stem.startswith("results") else f"_{stem}"
    files = {
        "results": folder / name,
        "predictions": folder / f"predictions{tail}.jsonl",
        "examples": folder / f"examples{tail}.png",
    }
    for file in files.values():
        if file.resolve() == epath.Path(data).resolve():
            raise OutputError(f"{file} is the data itself: write the results somewhere else")
    return files
