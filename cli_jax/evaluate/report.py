"""From predictions to `results.json`: accuracy per category, and what a constant would reach."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from cli_jax.evaluate.metrics import METRICS, exact_match, normalize
from cli_jax.output import write_lines

PACKAGES = ("cli-jax", "jax", "jaxlib", "flax", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One line of `predictions.jsonl`; `error` says why a row could not be asked."""

    id: str
    category: str
    question: str
    answer: str
    prediction: str
    error: str = ""

    @property
    def correct(self) -> bool:
        return not self.error and exact_match(self.answer, self.prediction) == 1

    def score(self, metric: str) -> float:
        """The metric's value in [0, 1]; a row that could not be asked scores 0."""
        return 0.0 if self.error else METRICS[metric](self.answer, self.prediction)


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Mean of every metric with its chance levels, overall and per category.

    `chance` is what always giving the group's commonest answer would reach, `chance_per_question`
    what giving each question text its own commonest answer would; both are fitted on the very
    rows they are computed on. The second says little where few rows share a question text:
    `distinct_questions` tells.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.category].append(prediction)
    return {
        "overall": _group(predictions),
        "categories": {name: _group(groups[name]) for name in sorted(groups)},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape the numbers, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
            found[package] = "not installed"
    return found


def write_predictions(path: epath.Path, predictions: Iterable[Prediction]) -> None:
    """One JSON object per line, in the order of the data file."""
    write_lines(path, ({**dataclasses.asdict(p), "correct": p.correct} for p in predictions))


def table(results: dict[str, Any]) -> str:
    """The numbers of `results.json` for the terminal, one line per category."""
    metrics = list(METRICS)
    head = f"{'category':<20} {'n':>6}" + "".join(f" {m:>14}" for m in metrics) + f" {'chance':>8}"
    lines = [head]
    for name, group in [*results["categories"].items(), ("overall", results["overall"])]:
        scores = "".join(f" {group[m]:>14.1%}" for m in metrics)
        lines.append(f"{name:<20} {group['n']:>6}{scores} {group['chance']['exact_match']:>8.1%}")
    return "\n".join(lines)


def _group(predictions: Sequence[Prediction]) -> dict[str, Any]:
    by_question: dict[str, list[str]] = defaultdict(list)
    for p in predictions:
        by_question[p.question].append(p.answer)
    constant = _commonest([p.answer for p in predictions])
    per_question = {question: _commonest(answers) for question, answers in by_question.items()}

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(predictions)

    return {
        "n": len(predictions),
        **{m: mean(p.score(m) for p in predictions) for m in METRICS},
        "chance": {m: mean(f(p.answer, constant) for p in predictions) for m, f in METRICS.items()},
        "chance_answer": constant,
        "chance_per_question": {
            m: mean(f(p.answer, per_question[p.question]) for p in predictions)
            for m, f in METRICS.items()
        },
        "distinct_questions": len(by_question),
    }


def _commonest(answers: Sequence[str]) -> str:
    """The most frequent answer, spellings that score alike counted as one, in its first spelling.

    The alphabet breaks ties, so that row order plays no part.
    """
    counts = Counter(normalize(answer) for answer in answers)
    winner = min(counts, key=lambda answer: (-counts[answer], answer))
    return min(answer for answer in answers if normalize(answer) == winner)
