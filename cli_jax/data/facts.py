"""What the questions and answers of a row say about its picture, as numbers at places.

Two kinds of questions are understood, those of the sets that the small configs train on: how many
objects of a kind are in one of three boxes, and the full reading of a meter with five digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cli_jax.text.conversation import ConversationError, exchanges, parse

BOXES = ("left", "middle", "right")
DIGITS = 5
# The words of a category, in the order in which captions use them; named as the data set does.
WORDS = {
    "all": ("objects",),
    "colour": ("black", "blue", "yellow"),
    "shape": ("circles", "squares", "triangles"),
    "size": ("small", "medium", "large"),
}
CATEGORIES = (*WORDS, "digit")

_CATEGORY = {word: category for category, words in WORDS.items() for word in words}
_COUNT = re.compile(r"How many (\w+)(?: objects)? are in the (left|middle|right) box\?")
_READING = "What is the full reading?"


class Fact(NamedTuple):
    """`value` objects of the kind `word` in the box `place`, or the digit at `place` of a meter.

    Places count from the left; there are `places` of equal width side by side in the picture.
    """

    category: str
    word: str
    place: int
    places: int
    value: int


def facts(row: Mapping[str, Any]) -> list[Fact]:
    """The facts of a row, in the order of its questions; others than the two kinds are passed over.

    Raises ConversationError if there is none, or for an answer that is no number.
    """
    found = []
    for question, answer in _pairs(row):
        if match := _COUNT.search(question):
            word, box = match.groups()
            if word in _CATEGORY:
                places = len(BOXES)
                count = _number(answer)
                found.append(Fact(_CATEGORY[word], word, BOXES.index(box), places, count))
        elif _READING in question:
            _number(answer)
            if len(answer) != DIGITS:
                raise ConversationError(f"the reading {answer!r:.80} has not {DIGITS} digits")
            found += [Fact("digit", "digit", i, DIGITS, int(d)) for i, d in enumerate(answer)]
    if not found:
        raise ConversationError(
            "the row has no question about counts in boxes or the reading of a meter"
        )
    return found


def _pairs(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for exchange in exchanges(row.get("conversations"), pictures=0):
        turns = parse(exchange)
        yield turns[0].text, turns[-1].text.strip()


def _number(answer: str) -> int:
    if not re.fullmatch("[0-9]+", answer):
        raise ConversationError(f"the answer {answer!r:.80} is not a number")
    return int(answer)
