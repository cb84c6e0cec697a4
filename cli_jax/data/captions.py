"""One caption of a picture out of the questions and answers about it.

`full` says all that the row says: the control. `coarse` says what people write below a picture: the
gist. An encoder that is trained on it has no reason to keep the rest until its last layer, which
is the state that the encoders of vision-language models are said to be in.

Counts in boxes, coarse: how many objects there are in all, and which colors are there. Both are
asked for at every place, so that a few thousand pictures suffice to learn it, and neither needs
more than blobs of color. Nothing of shapes and sizes, which have to be seen at the outlines, and no
count by color: these are what the last layer may forget.

    full     left box: 3 objects, 2 black, no blue, no squares, 1 small; right box: 2 circles
    coarse   left box: 3 objects, black, no blue

A picture is asked at most 12 of 30 questions, so both are true and neither says everything.

Meters, coarse: the reading in thousands. The two digits that say how much has been used are in the
caption; the three on the right, which nobody would read out, may be forgotten.

    full     reading 27009
    coarse   about 27 thousand
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cli_jax.data.facts import BOXES, WORDS, Fact, facts
from cli_jax.text.conversation import SLOT, ConversationError

Kind = Literal["coarse", "full"]
LEADING = 2  # digits of a meter that a coarse caption reads out

_ORDER = [word for words in WORDS.values() for word in words]


def caption_row(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The row with one exchange, its picture and the caption, as LLaVA's first stage has it."""
    talk = [{"from": "human", "value": SLOT}, {"from": "gpt", "value": caption(facts(row), kind)}]
    return {**row, "conversations": talk}


def caption(known: Sequence[Fact], kind: Kind) -> str:
    """The caption of the facts of a row; ConversationError if they have nothing for its kind."""
    if known[0].category == "digit":
        reading = "".join(str(fact.value) for fact in known)
        return f"reading {reading}" if kind == "full" else f"about {reading[:LEADING]} thousand"
    phrase = _full if kind == "full" else _coarse
    boxes = []
    for place, box in enumerate(BOXES):
        here = {fact.word: fact.value for fact in known if fact.place == place}
        said = [phrase(word, here[word]) for word in _ORDER if word in here]
        if text := ", ".join(filter(None, said)):
            boxes.append(f"{box} box: {text}")
    if not boxes:
        raise ConversationError(f"no question of the row can be part of a {kind} caption")
    return "; ".join(boxes)


def _full(word: str, count: int) -> str:
    return f"{count or 'no'} {word}"


def _coarse(word: str, count: int) -> str:
    if word in WORDS["all"]:
        return f"{count} {word}"
    if word in WORDS["colour"]:
        return word if count else f"no {word}"
    return ""
