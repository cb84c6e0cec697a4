"""Scores of one prediction against one answer. A new metric is a function and a registry line."""

from __future__ import annotations

from collections.abc import Callable


def normalize(text: str) -> str:
    """Lower-cases, strips white space around the text, then one final period.

    Nothing else is touched: "Yes." equals "yes", but "50%" does not equal "50", "1,000" does not
    equal "1000" and "the cat" does not equal "cat".
    """
    text = text.strip().lower()
    return text.removesuffix(".").rstrip()


def exact_match(answer: str, prediction: str) -> float:
    """1 if both texts are equal after `normalize`, else 0."""
    return float(normalize(answer) == normalize(prediction))


def per_character(answer: str, prediction: str) -> float:
    """Share of characters that stand at the right place, counted from the left, in [0, 1].

    For readings such as "27009" it is the accuracy per digit. It divides by the longer of the two
    texts, so that a prediction gains nothing by saying more than it was asked.
    """
    answer, prediction = normalize(answer), normalize(prediction)
    longer = max(len(answer), len(prediction))
    if not longer:
        return 1.0
    return sum(a == p for a, p in zip(answer, prediction, strict=False)) / longer


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "per_character": per_character,
}
