"""The prompts of a data set, for everything that watches a model while it reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from cli_jax.batch import Batch
from cli_jax.data import Sample
from cli_jax.data.sources import image_root_of
from cli_jax.evaluate.progress import progress_bar
from cli_jax.evaluate.prompts import Question, load_prompts, prompt_spec, read_questions
from cli_jax.experiment import Experiment
from cli_jax.generate.buckets import batches
from cli_jax.text import load_tokenizer


class AnalysisError(ValueError):
    """There is nothing to show; the message says why."""


class Findings(NamedTuple):
    """What an analysis leaves: files, {id: reason} of rows left out, and what it says in words."""

    written: list[epath.Path]
    left_out: dict[str, str]
    summary: str = ""


class Prompts:
    """The prompts with pictures of a LLaVA-format file: a row's last question and what precedes it.

    Walking through them fills `left_out`, {id: reason}, with the rows that cannot be read; rows
    without a picture are passed over. An empty `image_root` is the folder of `path`. Raises
    DataError for a file that cannot be read.
    """

    def __init__(
        self,
        experiment: Experiment,
        path: str | Path,
        image_root: str | Path,
        *,
        limit: int = 0,
        what: str,
    ) -> None:
        self.path, self.what = path, what
        self.questions = read_questions(path, limit)
        self.left_out: dict[str, str] = {}
        self._spec = prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), 0)
        self._root = image_root_of(path, image_root)

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """The prompts with pictures, each with its question's number."""
        with progress_bar(len(self.questions), self.what) as bar:
            for number, prompt in load_prompts(self.questions, self._root, self._spec):
                if isinstance(prompt, str):
                    self.left_out[self.questions[number].id] = prompt
                elif prompt.extent.images:
                    yield number, prompt
                bar.update()

    def batches(self, rows: int) -> Iterator[tuple[list[Question], Batch]]:
        """Batches of `rows` rows, the first of which hold one prompt each, in few shapes."""
        for numbers, batch in batches(self.samples(), rows, self._spec.vision, self._spec.extras):
            yield [self.questions[number] for number in numbers], batch

    def nothing(self, what: str) -> AnalysisError:
        """The error to raise when no row had `what`."""
        reasons = list(dict.fromkeys(self.left_out.values()))[:3] or ["no row has a picture"]
        return AnalysisError(f"{self.path} holds no {what}: {'; '.join(reasons)}")
