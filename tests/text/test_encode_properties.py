"""Properties of the encoders on random conversations, with a trained byte-level tokenizer."""

import functools

import golden_tokenizers as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from cli_jax.batch import IGNORE
from cli_jax.text import IMAGE, encode_conversation, encode_prompt
from cli_jax.text.tokenizer import from_backend

WORDS = ("What", "is", "this", "a", "cat?", "naïve", "数字", "🙂", "12", "\n", "\n\n", "...", "  ")
text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
answer = text.map(str.strip).filter(bool)  # leading newlines merge with the header: golden test
TEMPLATES = ["qwen_1_5", "question_first", "v1"]


@functools.cache
def byte_level():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [" ".join(WORDS), "USER: ASSISTANT: user\n assistant\n system\n"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return from_backend(backend)


@st.composite
def conversations(draw):
    """A conversation with its number of pictures; slots only in questions."""
    turns, images = [], 0
    for _ in range(draw(st.integers(1, 4))):
        question = draw(text)
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(question)))
            if "<image>"[1:] not in question[max(0, at - 7) : at + 7]:  # never inside a slot
                question, images = f"{question[:at]}<image>{question[at:]}", images + 1
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": draw(answer)}]
    return turns, images


def v1_pictures(turns):
    """What v1 makes of a row whose repeated slots it merges: skip rows with that ambiguity."""
    return all(turn["value"].count("<image>") <= 1 for turn in turns)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(case=conversations(), cut=st.integers(0, 3))
def test_a_prompt_is_a_prefix_of_the_conversation(template, case, cut):
    turns, images = case
    if template == "v1" and not v1_pictures(turns):
        return
    last = 2 * (cut % (len(turns) // 2))  # the question whose answer is wanted
    asked, answered = turns[: last + 1], turns[: last + 2]
    images = sum(turn["value"].count("<image>") for turn in asked)
    prompt = encode_prompt(asked, byte_level(), template, num_images=images)
    whole = encode_conversation(answered, byte_level(), template, num_images=images)
    assert prompt.tolist() == whole.ids[: len(prompt)].tolist()
    assert whole.answer_starts[-1] == len(prompt)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(case=conversations())
def test_labels_are_ids_or_ignored_and_answers_read_back(template, case):
    turns, images = case
    if template == "v1" and not v1_pictures(turns):
        return
    tokenizer = byte_level()
    only = encode_conversation(turns, tokenizer, template, "answer_only", num_images=images)
    reference = encode_conversation(turns, tokenizer, template, "reference", num_images=images)
    assert only.ids.tolist() == reference.ids.tolist()
    for encoded in (only, reference):
        kept = encoded.labels != IGNORE
        assert (encoded.labels[kept] == encoded.ids[kept]).all()
        assert not kept[encoded.ids == IMAGE].any()
    assert ((only.labels == IGNORE) | (only.labels == reference.labels)).all()
    # The spans with loss are the answers and their end tokens, nothing more.
    edges = np.flatnonzero(np.diff(np.r_[False, only.labels != IGNORE, False]))
    end = "</s>" if template == "v1" else "<|im_end|>"
    answers = [turn["value"] for turn in turns[1::2]]
    assert len(edges) == 2 * len(answers)
    for (start, stop), first, want in zip(
        edges.reshape(-1, 2), only.answer_starts, answers, strict=True
    ):
        assert start == first
        assert only.ids[stop - 1] == tokenizer.id_of(end)
        assert tokenizer.decode(only.ids[start : stop - 1]).strip() == want


def test_image_positions_match_the_number_of_slots():
    turns = [{"from": "human", "value": "<image> a <image> b"}, {"from": "gpt", "value": "A"}]
    got = encode_conversation(turns, golden.qwen(), "qwen_1_5", num_images=2)
    assert (got.ids == IMAGE).sum() == 2
