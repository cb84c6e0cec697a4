"""Ids and labels against sequences taken from the references (LLaVA-NeXT, LLaVA)."""

import golden_tokenizers as golden
import numpy as np
import pytest

from cli_jax.batch import IGNORE
from cli_jax.text import (
    IMAGE,
    ConversationError,
    encode_conversation,
    encode_history,
    encode_prompt,
    stop_ids,
)

SYSTEM = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
SYSTEM_LABELS = [151644, -100, 198, *[-100] * 6, 151645, 198]
USER, ASSISTANT, END = [151644, 872, 198], [151644, 77091, 198], [151645, 198]
USER_LABELS = [151644, -100, 198]
WHAT, CAT = [3838, 374, 419, 30], [32, 8251, 13]

V1_SYSTEM = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450]
V1_SYSTEM += [20255, 4076, 8444, 29892, 13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915]
V1_SYSTEM += [29879, 5155, 29889]
V1_USER, V1_NEXT_USER, V1_ASSISTANT = [3148, 1001, 29901], [11889, 29901], [319, 1799, 9047, 13566]
V1_ASSISTANT += [29901]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_qwen_single_turn_equals_the_reference():
    got = encode_conversation(
        turns("<image>\nWhat is this?", "A cat."), golden.qwen(), "qwen_1_5", num_images=1
    )
    ids = [*SYSTEM, *USER, IMAGE, 198, *WHAT, *END, *ASSISTANT, *CAT, *END]
    labels = [*SYSTEM_LABELS, *USER_LABELS, -100, 198, -100, -100, -100, -100, *END]
    labels += [*ASSISTANT, *CAT, *END]
    assert got.ids.tolist() == ids
    assert got.ids.tolist().index(IMAGE) == 14
    assert got.labels.tolist() == labels
    assert got.answer_starts.tolist() == [25]
    assert got.ids.dtype == got.labels.dtype == np.int32


def test_question_first_puts_the_picture_behind_its_question():
    case = turns("<image>\nWhat is this?", "A cat.", "Why?", "A dog.")
    got = encode_conversation(case, golden.qwen(), "question_first", "answer_only", num_images=1)
    first = [*USER, *WHAT, 198, IMAGE, *END, *ASSISTANT]
    second = [*USER, 10234, 30, *END, *ASSISTANT]
    assert got.ids.tolist() == [*first, *CAT, *END, *second, 32, 5562, 13, *END]
    assert got.answer_starts.tolist() == [len(first), len(first) + 5 + len(second)]
    assert stop_ids(golden.qwen(), "question_first") == stop_ids(golden.qwen(), "qwen_1_5")


def test_qwen_answer_only_has_loss_on_content_and_end_token():
    got = encode_conversation(
        turns("<image>\nWhat is this?", "A cat.", "Why?", "A dog."),
        golden.qwen(),
        "qwen_1_5",
        "answer_only",
        num_images=1,
    )
    first = [*SYSTEM, *USER, IMAGE, 198, *WHAT, *END, *ASSISTANT]
    second = [*USER, 10234, 30, *END, *ASSISTANT]
    assert got.ids.tolist() == [*first, *CAT, *END, *second, 32, 5562, 13, *END]
    expected = [IGNORE] * len(first) + [*CAT, 151645, IGNORE]
    expected += [IGNORE] * len(second) + [32, 5562, 13, 151645, IGNORE]
    assert got.labels.tolist() == expected
    assert got.answer_starts.tolist() == [len(first), len(first) + 5 + len(second)]


def test_qwen_moves_a_lone_picture_to_the_front_and_leaves_several():
    one = encode_conversation(
        turns("What is this?<image>", "A cat."), golden.qwen(), "qwen_1_5", num_images=1
    )
    assert one.ids.tolist()[11:20] == [*USER, IMAGE, 198, *WHAT]
    glued = encode_conversation(
        turns("<image>What is this?", "A cat."), golden.qwen(), "qwen_1_5", num_images=1
    )
    assert glued.ids.tolist()[11:19] == [*USER, IMAGE, *WHAT]  # already in front: untouched
    two = encode_conversation(
        turns("What<image> is this?\n<image>", "A cat."), golden.qwen(), "qwen_1_5", num_images=2
    )
    assert two.ids.tolist()[11:22] == [*USER, 3838, IMAGE, 374, 419, 30, 198, IMAGE, 151645]
    assert two.labels[15] == two.labels[20] == IGNORE


def test_qwen_picture_in_an_answer_has_no_loss():
    got = encode_conversation(
        turns("What is this?", "<image>\nA cat."), golden.qwen(), "qwen_1_5", num_images=1
    )
    at = got.ids.tolist().index(IMAGE)
    assert got.labels[at] == IGNORE
    assert got.labels[at + 1] == 198


def test_qwen_newlines_that_merge_with_the_header_stay_merged():
    """The reference tokenizes a turn in one piece; the merged token counts as answer."""
    got = encode_conversation(
        turns("Why?", "\nA cat."), golden.qwen(), "qwen_1_5", "answer_only", num_images=0
    )
    assert got.ids.tolist()[18:] == [151644, 77091, 271, *CAT, *END]
    assert got.labels.tolist()[18:] == [-100, -100, 271, *CAT, 151645, -100]
    assert got.answer_starts.tolist() == [20]


@pytest.mark.parametrize("template", ["qwen_1_5", "v1"])
def test_literal_slot_in_a_text_only_sample_stays_text(template):
    tokenizer = {"qwen_1_5": golden.qwen, "v1": golden.v1}[template]()
    got = encode_conversation(turns("What is<image>?", "A cat."), tokenizer, template, num_images=0)
    assert IMAGE not in got.ids
    pieces = [tokenizer.id_of(p) for p in ("<", "image", ">")]
    ids = got.ids.tolist()
    assert ids[ids.index(pieces[0]) :][:3] == pieces


def test_v1_single_turn_equals_the_reference():
    got = encode_conversation(
        turns("What is this?\n<image>", "A cat."), golden.v1(), "v1", num_images=1
    )
    prompt = [*V1_SYSTEM, *V1_USER, 29871, IMAGE, 29871, 13, 5618, 338, 445, 29973, *V1_ASSISTANT]
    assert got.ids.tolist() == [*prompt, 319, 6635, 29889, 2]
    assert got.ids.tolist().index(IMAGE) == 35
    assert got.labels.tolist() == [IGNORE] * len(prompt) + [319, 6635, 29889, 2]
    assert got.answer_starts.tolist() == [len(prompt)]


@pytest.mark.parametrize("labels", ["reference", "answer_only"])
def test_v1_multi_turn_equals_the_reference(labels):
    got = encode_conversation(
        turns("<image>\nWhat is this?", "A cat.", "Why?", "A dog."),
        golden.v1(),
        "v1",
        labels,
        num_images=1,
    )
    prompt = [*V1_SYSTEM, *V1_USER, 29871, IMAGE, 29871, 13, 5618, 338, 445, 29973, *V1_ASSISTANT]
    second = [*V1_NEXT_USER, 3750, 29973, *V1_ASSISTANT]
    assert got.ids.tolist() == [*prompt, 319, 6635, 29889, 2, *second, 319, 11203, 29889, 2]
    expected = [IGNORE] * len(prompt) + [319, 6635, 29889, 2]
    expected += [IGNORE] * len(second) + [319, 11203, 29889, 2]
    assert got.labels.tolist() == expected
    assert got.answer_starts.tolist() == [len(prompt), len(prompt) + 4 + len(second)]


def test_v1_text_only_has_no_extra_piece():
    got = encode_conversation(turns("What is this?", "A cat."), golden.v1(), "v1", num_images=0)
    prompt = [*V1_SYSTEM, *V1_USER, 1724, 338, 445, 29973, *V1_ASSISTANT]
    assert got.ids.tolist() == [*prompt, 319, 6635, 29889, 2]


def test_v1_merges_repeated_slots_of_one_picture_and_keeps_several_pictures():
    merged = encode_conversation(
        turns("<image> dogs<image>?", "A cat."), golden.v1(), "v1", num_images=1
    )
    assert merged.ids.tolist()[34:40] == [29871, IMAGE, 29871, 13, 0, 29973]
    several = encode_conversation(
        turns("<image> is<image>?", "A cat."), golden.v1(), "v1", num_images=2
    )
    assert several.ids.tolist()[35:40] == [IMAGE, 338, IMAGE, 29871, 29973]


def test_plain_is_picture_caption_newline():
    conversation = turns("Describe it.\n<image>", "A cat.")
    got = encode_conversation(conversation, golden.v1(), "plain", num_images=1)
    assert got.ids.tolist() == [1, IMAGE, 319, 6635, 29889, 13]
    assert got.labels.tolist() == [IGNORE, IGNORE, 319, 6635, 29889, 13]
    qwen = encode_conversation(conversation, golden.qwen(), "plain", num_images=1)
    assert qwen.ids.tolist() == [IMAGE, *CAT, 198]
    assert qwen.labels.tolist() == [IGNORE, *CAT, 198]
    assert qwen.answer_starts.tolist() == [1]
    prompt = encode_prompt(conversation[:1], golden.v1(), "plain", num_images=1)
    assert prompt.tolist() == [1, IMAGE]


def test_a_first_turn_that_is_not_the_humans_is_dropped():
    conversation = turns("What is this?", "A cat.")
    for first in ({"from": "gpt", "value": "Why?"}, {"role": "system", "content": "Why?"}):
        for template, tokenizer in (("qwen_1_5", golden.qwen()), ("v1", golden.v1())):
            got = encode_conversation([first, *conversation], tokenizer, template, num_images=0)
            want = encode_conversation(conversation, tokenizer, template, num_images=0)
            assert got.ids.tolist() == want.ids.tolist()


def test_role_and_content_keys_mean_the_same():
    openai = [
        {"role": "user", "content": "<image>\nWhat is this?"},
        {"role": "assistant", "content": "A cat."},
    ]
    llava = turns("<image>\nWhat is this?", "A cat.")
    a = encode_conversation(openai, golden.qwen(), "qwen_1_5", num_images=1)
    b = encode_conversation(llava, golden.qwen(), "qwen_1_5", num_images=1)
    assert a.ids.tolist() == b.ids.tolist()
    assert a.labels.tolist() == b.labels.tolist()


def test_a_system_turn_inside_is_masked_by_qwen():
    conversation = [*turns("Why?"), {"from": "system", "value": "What"}, *turns("", "A cat.")[1:]]
    got = encode_conversation(conversation, golden.qwen(), "qwen_1_5", num_images=0)
    assert got.ids.tolist()[18:24] == [151644, 8948, 198, 3838, *END]
    assert got.labels.tolist()[18:24] == [151644, IGNORE, 198, IGNORE, *END]


@pytest.mark.parametrize(
    ("conversation", "template", "num_images", "reason"),
    [
        ([], "qwen_1_5", 0, "empty"),
        (turns("Why?", "A")[1:], "qwen_1_5", 0, "empty"),
        (None, "qwen_1_5", 0, "not a list"),
        ("What", "qwen_1_5", 0, "not a list"),
        (["What"], "qwen_1_5", 0, "not a mapping"),
        ([{"from": "robot", "value": "A"}], "qwen_1_5", 0, "unknown role 'robot'"),
        ([{"from": ["human"], "value": "A"}], "qwen_1_5", 0, "unknown role"),
        ([{"from": "human", "value": None}], "v1", 0, "not text"),
        (turns("Why?", "half a \ud83d"), "qwen_1_5", 0, "not text: .* surrogates"),
        (turns("Why?"), "qwen_1_5", 0, "no answer"),
        (turns("<image>\nWhy?", "A"), "qwen_1_5", 2, "1 <image> slots in the text for 2 images"),
        (turns("<image><image>", "A"), "qwen_1_5", 1, "2 <image> slots in the text for 1 images"),
        (turns("Why?", "A"), "v1", 1, "0 <image> slots in the text for 1 images"),
        (turns("Why?", "A", "What?"), "v1", 0, "without an answer"),
        ([*turns("Why?"), *turns("What?", "A")], "v1", 0, "alternate"),
        (turns("Why?", ""), "v1", 0, "cannot write"),
        (turns("Why?", "A</s>"), "v1", 0, "cannot write"),
        (turns("Why?", "A ASSISTANT: A"), "v1", 0, "cannot write"),
        (turns("Why?", "A"), "plain", 0, "one picture"),
        (turns("<image>", "A", "Why?", "A"), "plain", 1, "one picture"),
    ],
)
def test_bad_conversations_are_named(conversation, template, num_images, reason):
    tokenizer = golden.v1() if template == "v1" else golden.qwen()
    with pytest.raises(ConversationError, match=reason):
        encode_conversation(conversation, tokenizer, template, num_images=num_images)


def test_a_prompt_must_end_with_a_question():
    with pytest.raises(ConversationError, match="ends with an answer"):
        encode_prompt(turns("Why?", "A"), golden.qwen(), "qwen_1_5", num_images=0)


def test_history_tells_where_earlier_answers_start():
    conversation = turns("<image>\nWhat is this?", "A cat.", "Why?", "A dog.")
    for template, tokenizer in (("qwen_1_5", golden.qwen()), ("v1", golden.v1())):
        whole = encode_conversation(conversation, tokenizer, template, num_images=1)
        history = encode_history(conversation[:3], tokenizer, template, num_images=1)
        assert history.answer_starts.tolist() == whole.answer_starts.tolist()[:1]
        assert len(history.ids) == whole.answer_starts[1]
        assert set(history.labels.tolist()) == {IGNORE}


def test_stop_ids_end_an_answer_of_each_template():
    assert stop_ids(golden.qwen(), "qwen_1_5") == [151645]
    assert stop_ids(golden.v1(), "v1") == [2]
    assert stop_ids(golden.v1(), "plain") == [2, 13]
