"""Conversations as they come in LLaVA's JSON: roles, turns and where the pictures stand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

SLOT = "<image>"  # in text: the place of a picture
_ROLES: dict[str, Literal["human", "gpt", "system"]] = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}


class ConversationError(ValueError):
    """A conversation that cannot be used; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Turn:
    role: Literal["human", "gpt", "system"]
    text: str


def parse(conversations: Any) -> list[Turn]:
    """The turns of `from`/`value` or `role`/`content` mappings.

    As in both references a first turn that is not the human's is dropped.
    Raises ConversationError for an empty conversation, an unknown role or a value that is no text.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise ConversationError("conversations is not a list of turns")
    turns = [_turn(turn) for turn in conversations]
    if turns and turns[0].role != "human":
        turns = turns[1:]
    if not turns:
        raise ConversationError("the conversation is empty")
    return turns


def before_last_answer(conversations: Any) -> list[Any]:
    """The turns before the last answer: what a model is asked; all of them if there is none."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise ConversationError("conversations is not a list of turns")
    answers = [i for i, turn in enumerate(conversations) if _turn(turn).role == "gpt"]
    return list(conversations[: answers[-1]] if answers else conversations)


def one_exchange(conversations: Any, pictures: int, choose: Callable[[int], int]) -> Any:
    """One question of a row with its answer, behind all slots of the row's pictures, if any.

    `choose(n)` picks one of n exchanges. Short answers to many questions about one picture can be
    copied from each other; trained one at a time they have to be read off the picture.
    """
    found = exchanges(conversations, pictures)
    return found[choose(len(found))] if len(found) > 1 else found[0]


def exchanges(conversations: Any, pictures: int) -> list[Any]:
    """All that `one_exchange` chooses from; the row as it is if it has fewer than two."""
    turns = parse(conversations)
    pairs = [
        (asked.text, answer.text)
        for asked, answer in itertools.pairwise(turns)
        if (asked.role, answer.role) == ("human", "gpt")
    ]
    if len(pairs) < 2:
        return [conversations]
    if pictures:
        slots = f"{SLOT}\n" * sum(turn.text.count(SLOT) for turn in turns)
        pairs = [(slots + asked.replace(SLOT, "").strip(), answer) for asked, answer in pairs]
    return [
        [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        for asked, answer in pairs
    ]


def slots_first(text: str) -> str:
    """`text` with a single slot at its front, as both references rewrite a turn with a picture."""
    return f"{SLOT}\n{text.replace(SLOT, '').strip()}".strip()


def slots_last(text: str) -> str:
    """`text` with all its slots behind it, each on a line of its own."""
    return text.replace(SLOT, "").strip() + f"\n{SLOT}" * text.count(SLOT)


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, Mapping):
        raise ConversationError(f"a turn is not a mapping: {turn!r:.80}")
    role_key, text_key = ("role", "content") if "role" in turn else ("from", "value")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise ConversationError(f"unknown role {role!r}; known: {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ConversationError(f"the {text_key} of a {role} turn is not text: {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"the {text_key} of a {role} turn is not text: {error}") from None
    return Turn(_ROLES[role], text)
