"""From a LLaVA-format file to questions, and from questions to prompts. No jax.

A row asks for its last answer; the turns before it, pictures included, are the prompt.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from cli_jax.data import RowError, RowFile, Sample, SampleSpec, TooLong, make_prompt_sample
from cli_jax.data.collate import Extent
from cli_jax.experiment import Experiment
from cli_jax.image.errors import ImageError
from cli_jax.image.preprocess import make_tiles, open_image
from cli_jax.text import ConversationError, Tokenizer
from cli_jax.text.conversation import SLOT, parse

GRAY = (127, 127, 127)
THREADS = 4  # that read pictures; Pillow decodes and resizes outside the interpreter lock
BAD_ROW = (RowError, ConversationError, ImageError, TooLong)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a row asks; `error` says why it cannot be asked."""

    id: str
    category: str
    text: str = ""
    answer: str = ""
    images: tuple[str, ...] = ()
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    error: str = ""


class Questions(Sequence[Question]):
    """The questions of a JSON or JSONL file, in order; each is read anew and none is kept.

    A row without `category` belongs to `all`, one without `id` is called by its number.
    """

    def __init__(self, rows: RowFile, length: int) -> None:
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        return _question(self._rows, range(self._length)[index])


def read_questions(path: str | Path, limit: int = 0) -> Questions:
    """The questions of a file; the first `limit` of them, 0 = all.

    Raises DataError for a file that cannot be read.
    """
    rows = RowFile(path)
    return Questions(rows, min(limit or len(rows), len(rows)))


def prompt_spec(experiment: Experiment, tokenizer: Tokenizer, new_tokens: int) -> SampleSpec:
    """How questions become prompts: as in training, but as long as the decoder can read."""
    model = experiment.model
    spec = SampleSpec.from_config(
        experiment.data, model.image, model.vision, tokenizer, experiment.extras
    )
    room = model.text.max_position_embeddings - new_tokens
    return dataclasses.replace(spec, room=Extent(room, room, room, room, room))


def load_prompts(
    questions: Sequence[Question], root: str, spec: SampleSpec, *, blank: bool = False
) -> Iterator[tuple[int, Sample | str]]:
    """The prompts in order, each with its question's number; a text instead says why there is none.

    `blank` replaces every picture by a uniform gray one of its size. A few threads read ahead.
    """

    def load(question: Question) -> Sample | str:
        if question.error:
            return question.error
        try:
            sample = make_prompt_sample(question.row, root, spec)
            return _blank(sample, question, root, spec) if blank else sample
        except BAD_ROW as error:
            return _reason(error)

    waiting: deque[tuple[int, Future[Sample | str]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for number, question in enumerate(questions):
            waiting.append((number, pool.submit(load, question)))
            if len(waiting) > 2 * THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def open_pictures(
    question: Question, root: str, spec: SampleSpec, *, blank: bool = False
) -> list[Image.Image]:
    """The question's pictures, or gray ones of their sizes. Raises ImageError."""
    images = [open_image(root, path, spec.image.max_pixels) for path in question.images]
    return [Image.new("RGB", image.size, GRAY) for image in images] if blank else images


def _question(rows: RowFile, number: int) -> Question:
    try:
        row = rows[number]
    except RowError as error:
        return Question(str(number), "all", error=_reason(error))
    known = Question(str(row.get("id", number)), str(row.get("category", "all")))
    try:
        turns = parse(row.get("conversations"))
        last = max((i for i, turn in enumerate(turns) if turn.role == "gpt"), default=0)
        asked = [turn.text for turn in turns[:last] if turn.role == "human"]
        if not asked or not turns[last].text.strip():
            raise ConversationError("the row has no question with an answer to compare with")
    except ConversationError as error:
        return dataclasses.replace(known, error=_reason(error))
    text, answer = asked[-1].replace(SLOT, "").strip(), turns[last].text.strip()
    return dataclasses.replace(known, text=text, answer=answer, images=_paths(row), row=row)


def _paths(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The picture's paths; what is neither a path nor a list is refused by make_prompt_sample."""
    image = row.get("image")
    paths = image if isinstance(image, list) else [image]
    return tuple(path for path in paths if path and isinstance(path, str))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _blank(sample: Sample, question: Question, root: str, spec: SampleSpec) -> Sample:
    images = open_pictures(question, root, spec, blank=True)
    if not images:
        return sample
    how: Any = {"single": len(images) == 1, "extras": spec.extras}
    tiles = [make_tiles(image, spec.image, spec.vision, **how) for image in images]
    return dataclasses.replace(sample, tiles=np.concatenate(tiles))
