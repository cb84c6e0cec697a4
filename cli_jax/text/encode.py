"""Conversations to ids and labels, in the chat templates of LLaVA-OneVision and LLaVA-1.5.

Ids and `reference` labels equal the references token by token (tests/text holds golden sequences).
Texts are tokenized in the references' units, a turn for `qwen_1_5` and the whole conversation for
`v1`, each cut at the pictures; where an answer begins inside a unit is read from the tokenizer's
character offsets, so the units are never cut further and ids cannot depend on the label mode.

`question_first` is ours, for models trained from nothing: `qwen_1_5` without its system turn, and
with the pictures behind the text of their turn, so that every visual token sees the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from cli_jax.batch import IGNORE
from cli_jax.text.conversation import (
    SLOT,
    ConversationError,
    Turn,
    parse,
    slots_first,
    slots_last,
)
from cli_jax.text.tokenizer import Tokenizer

IMAGE = -200  # the id of a picture before it is expanded into its visual tokens

Template = Literal["qwen_1_5", "v1", "plain", "question_first"]
Labels = Literal["reference", "answer_only"]

QWEN_SYSTEM = "You are a helpful assistant."
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_QWEN_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_QWEN_END = "<|im_end|>"
_V1_END = "</s>"
_V1_ANSWER = " ASSISTANT: "


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One conversation as ids; a picture is the single id IMAGE.

    ids            int32 [n]
    labels         int32 [n]  unshifted: the id where there is loss, else IGNORE
    answer_starts  int32 [a]  position of the first content token of every answer, in order; a
                              picture inside an answer starts a further one behind it
    """

    ids: np.ndarray
    labels: np.ndarray
    answer_starts: np.ndarray


@dataclasses.dataclass
class _Draft:
    """Ids so far, with the spans [start, end) that hold an answer and its end token."""

    ids: list[int]
    answers: list[tuple[int, int]]
    reference: list[tuple[int, int]]  # the spans in which the reference has loss

    def finish(self, labels: Labels, everywhere: set[int]) -> Encoded:
        """Labels the spans; `everywhere` holds the ids the reference labels wherever they are."""
        ids = np.asarray(self.ids, np.int32)
        mask = np.zeros(len(ids), bool)
        if labels == "reference":
            mask |= np.isin(ids, list(everywhere))
        for start, end in self.reference if labels == "reference" else self.answers:
            mask[start:end] = True
        mask &= ids != IMAGE
        starts = [start for start, _ in self.answers]
        # What follows a picture inside an answer is content after that picture.
        starts += [
            start + 1 + int(at)
            for start, end in self.answers
            for at in np.flatnonzero(ids[start:end] == IMAGE)
        ]
        labeled = np.where(mask, ids, IGNORE).astype(np.int32)
        return Encoded(ids, labeled, np.asarray(sorted(starts), np.int32))


def encode_conversation(
    conversations: Any,
    tokenizer: Tokenizer,
    template: Template,
    labels: Labels = "reference",
    *,
    num_images: int,
) -> Encoded:
    """Encodes a conversation for training.

    `labels="reference"` is the references' mask (for `qwen_1_5`: whole assistant turns with their
    header, and every newline, <|im_start|> and <|im_end|> anywhere); `answer_only` has loss on the
    answers' contents and their end tokens only. With `num_images == 0` a literal "<image>" is text.
    Raises ConversationError when the conversation cannot be used: unknown role, no answer, a number
    of "<image>" slots other than `num_images`. Source: LLaVA-NeXT `preprocess_qwen`, LLaVA
    `preprocess_v1`, both `preprocess_plain` and `preprocess_multimodal`.
    """
    turns = parse(conversations)
    if not any(turn.role == "gpt" for turn in turns):
        raise ConversationError("the conversation has no answer")
    draft = _draft(turns, tokenizer, template, num_images)
    everywhere: set[int] = set()
    if template in ("qwen_1_5", "question_first"):
        specials = (tokenizer.id_of("<|im_start|>"), tokenizer.id_of(_QWEN_END))
        everywhere = {*specials, *tokenizer.encode("\n")}
    return draft.finish(labels, everywhere)


def encode_history(
    conversations: Any, tokenizer: Tokenizer, template: Template, *, num_images: int
) -> Encoded:
    """Encodes turns that end with a question, up to and including the header of the answer.

    No label is set; `answer_starts` are those of earlier answers. The ids are a prefix of what
    `encode_conversation` returns when the answer is appended. Raises ConversationError as above.
    """
    turns = parse(conversations)
    if turns[-1].role == "gpt":
        raise ConversationError("the prompt ends with an answer instead of a question")
    draft = _draft(turns, tokenizer, template, num_images, generate=True)
    encoded = draft.finish("answer_only", set())
    return dataclasses.replace(encoded, labels=np.full_like(encoded.labels, IGNORE))


def encode_prompt(
    conversations: Any, tokenizer: Tokenizer, template: Template, *, num_images: int
) -> np.ndarray:
    """The ids [n] of `encode_history`: a prompt ready for generation."""
    return encode_history(conversations, tokenizer, template, num_images=num_images).ids


def stop_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids that end an answer: the template's end token and the tokenizer's."""
    end = {"qwen_1_5": _QWEN_END, "question_first": _QWEN_END, "v1": _V1_END}.get(template)
    last = tokenizer.encode("\n")[-1] if end is None else tokenizer.id_of(end)
    return sorted({last, tokenizer.eos_id})


def _draft(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    num_images: int,
    generate: bool = False,
) -> _Draft:
    writers = {"qwen_1_5": _qwen, "question_first": _question_first, "v1": _v1, "plain": _plain}
    writer = writers[template]
    draft = writer(turns, tokenizer, num_images, generate)
    slots = draft.ids.count(IMAGE)
    if slots != num_images:
        raise ConversationError(f"{slots} {SLOT} slots in the text for {num_images} images")
    return draft


def _qwen(turns: Sequence[Turn], tokenizer: Tokenizer, num_images: int, generate: bool) -> _Draft:
    def placed(text: str) -> str:
        # LLaVA-NeXT moves a picture to the front of its turn only if the turn has exactly one.
        alone = num_images > 0 and text.count(SLOT) == 1 and not text.startswith(SLOT)
        return slots_first(text) if alone else text

    turns = [Turn("system", QWEN_SYSTEM), *(Turn(turn.role, placed(turn.text)) for turn in turns)]
    return _marked(turns, tokenizer, num_images, generate)


def _question_first(
    turns: Sequence[Turn], tokenizer: Tokenizer, num_images: int, generate: bool
) -> _Draft:
    def placed(text: str) -> str:
        return slots_last(text) if num_images > 0 and SLOT in text else text

    turns = [Turn(turn.role, placed(turn.text)) for turn in turns]
    return _marked(turns, tokenizer, num_images, generate)


def _marked(turns: Sequence[Turn], tokenizer: Tokenizer, num_images: int, generate: bool) -> _Draft:
    """Turns between <|im_start|> with the role and <|im_end|>, as Qwen's models know them."""
    tokenizer.id_of("<|im_start|>")  # a tokenizer without it would spell the markers out
    draft = _Draft([], [], [])
    newline = len(tokenizer.encode("\n"))
    for turn in turns:
        header = f"<|im_start|>{_QWEN_ROLES[turn.role]}\n"
        ids, ends = _tokenize(f"{header}{turn.text}{_QWEN_END}\n", tokenizer, num_images)
        before = len(draft.ids)
        draft.ids += ids
        if turn.role == "gpt":
            draft.answers.append(
                (before + _first_after(ends, len(header)), len(draft.ids) - newline)
            )
            draft.reference.append((before, len(draft.ids)))
    if generate:
        draft.ids += tokenizer.encode("<|im_start|>assistant\n")
    return draft


def _v1(turns: Sequence[Turn], tokenizer: Tokenizer, num_images: int, generate: bool) -> _Draft:
    tokenizer.id_of(_V1_END)
    text, spans = V1_SYSTEM, []
    for i, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[i % 2]:
            raise ConversationError("human and gpt turns do not alternate")
        content = turn.text
        # LLaVA moves a picture to the front of its turn and merges repeated slots; a turn with
        # several pictures, which it does not know, keeps them where they are.
        if num_images > 0 and SLOT in content and 1 in (num_images, content.count(SLOT)):
            content = slots_first(content)
        # The reference masks such samples completely, since it splits the text at these strings.
        if not content or _V1_END in content or _V1_ANSWER in content:
            raise ConversationError(f"template v1 cannot write the turn {content!r:.80}")
        if turn.role == "human":
            text += f"{'' if text.endswith(_V1_END) else ' '}USER: {content}"
        else:
            start = len(text) + len(_V1_ANSWER) - 1
            text += f"{_V1_ANSWER}{content}{_V1_END}"
            spans.append((start, len(text)))
    if generate:
        text += _V1_ANSWER.rstrip()
    elif turns[-1].role != "gpt":
        raise ConversationError("the conversation ends without an answer")
    ids, ends = _tokenize(text, tokenizer, num_images)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    answers = [
        (len(bos) + _first_after(ends, start), len(bos) + _first_after(ends, end))
        for start, end in spans
    ]
    return _Draft(bos + ids, answers, answers)


def _plain(turns: Sequence[Turn], tokenizer: Tokenizer, num_images: int, generate: bool) -> _Draft:
    if num_images != 1 or SLOT not in turns[0].text or len(turns) != (1 if generate else 2):
        raise ConversationError("template plain takes one picture and its caption")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids.append(IMAGE)  # the words of the human turn are dropped
    if generate:
        return _Draft(ids, [], [])
    caption, _ = _tokenize(turns[1].text + "\n", tokenizer, num_images)
    span = [(len(ids), len(ids) + len(caption))]
    return _Draft(ids + caption, span, span)


def _tokenize(text: str, tokenizer: Tokenizer, num_images: int) -> tuple[list[int], list[int]]:
    """Ids and character ends of one unit; with pictures, the text between slots is cut there."""
    ids: list[int] = []
    ends: list[int] = []
    at = 0
    for i, chunk in enumerate(text.split(SLOT) if num_images else [text]):
        if i:
            at += len(SLOT)
            ids.append(IMAGE)
            ends.append(at)
        chunk_ids, chunk_ends = tokenizer.encode_with_ends(chunk)
        ids += chunk_ids
        ends += [at + end for end in chunk_ends]
        at += len(chunk)
    return ids, ends


def _first_after(ends: Sequence[int], at: int) -> int:
    """The first token that reaches beyond character `at`; all of them if none does."""
    return next((i for i, end in enumerate(ends) if end > at), len(ends))
