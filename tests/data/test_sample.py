"""One row to one sample: expansion of pictures, plans, labels, e_i, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import small

from cli_jax.batch import IGNORE
from cli_jax.config import ImageConfig
from cli_jax.data import RowError, SampleSpec, TooLong, make_prompt_sample, make_sample
from cli_jax.data.augment import Augmentation
from cli_jax.data.collate import Extent
from cli_jax.image.anyres import layout
from cli_jax.image.errors import ImageError
from cli_jax.image.preprocess import make_tiles, open_image
from cli_jax.text import IMAGE, ConversationError, encode_conversation

TOKENIZER = small.tokenizer()
SPEC = SampleSpec.from_config(small.DATA, small.IMAGE, small.VISION, TOKENIZER)


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def encoded(row, images, labels="answer_only"):
    return encode_conversation(
        row["conversations"], TOKENIZER, "qwen_1_5", labels, num_images=images
    )


def test_a_picture_takes_the_place_of_its_slot(tmp_path):
    name = small.picture(tmp_path, "a.png", 12, 6)
    row = small.row(7, "<image>Q", "A", name)
    sample = make_sample(row, str(tmp_path), SPEC)
    plan = layout(12, 6, small.IMAGE, small.VISION, single=True)
    text = encoded(row, 1)
    at = text.ids.tolist().index(IMAGE)
    p = plan.num_tokens
    assert sample.id == "r7"
    assert sample.extent == (len(text.ids) - 1 + p, p, plan.num_tiles, 1, len(text.ids) - 1)
    assert sample.ids.tolist() == [*text.ids[:at], *[0] * p, *text.ids[at + 1 :]]
    assert sample.labels.tolist() == [*text.labels[:at], *[IGNORE] * p, *text.labels[at + 1 :]]
    assert sample.visual_position.tolist() == list(range(at, at + p))
    assert sample.visual_image.tolist() == [0] * p
    np.testing.assert_array_equal(sample.plan_index, plan.plan_index)
    np.testing.assert_array_equal(sample.plan_weight, plan.plan_weight)
    np.testing.assert_array_equal(sample.visual_newline, plan.newline)
    image = open_image(tmp_path, name, 10**6)
    tiles = make_tiles(image, small.IMAGE, small.VISION, single=True)
    np.testing.assert_array_equal(sample.tiles, tiles)
    assert sample.context_end.tolist() == [text.answer_starts[0] - 1 + p]
    first = sample.ids[sample.context_end[0]]
    assert TOKENIZER.decode([first]) == "A"
    assert sample.labels[sample.context_end[0]] == first


@pytest.mark.parametrize("image", [None, [], "", "absent"])
def test_without_a_picture_a_slot_is_text(tmp_path, image):
    row = small.row(0, "<image>Q", "A", image)
    if image == "absent":
        del row["image"]
    sample = make_sample(row, str(tmp_path), SPEC)
    assert sample.ids.tolist() == encoded(row, 0).ids.tolist()
    assert sample.extent == (len(sample.ids), 0, 0, 0, len(sample.ids))
    assert sample.tiles.shape == (0, 8, 8, 3)


def test_a_list_of_one_is_a_single_picture(tmp_path):
    name = small.picture(tmp_path, "a.png", 16, 16)
    one = make_sample(small.row(0, image=name), str(tmp_path), SPEC)
    listed = make_sample(small.row(0, image=[name]), str(tmp_path), SPEC)
    assert small.key(one) == small.key(listed)
    assert one.extent.tiles == 5


def test_several_pictures_keep_their_order_and_places(tmp_path):
    names = [small.picture(tmp_path, f"{i}.png", 16, 5 + i, i) for i in range(2)]
    row = small.row(0, "<image>Q<image>", "A", names)
    sample = make_sample(row, str(tmp_path), SPEC)
    # pad_newline: one tile of 4 patches and a newline each.
    assert sample.extent[1:4] == (10, 2, 2)
    assert sample.visual_image.tolist() == [0] * 5 + [1] * 5
    assert sample.visual_newline.tolist() == ([False] * 4 + [True]) * 2
    assert sample.plan_index[[0, 3, 5, 8], 0].tolist() == [0, 3, 4, 7]
    assert sample.visual_position[5] == sample.visual_position[4] + 2  # the Q in between
    for i, name in enumerate(names):
        image = open_image(tmp_path, name, 10**6)
        want = make_tiles(image, small.IMAGE, small.VISION, single=False)
        np.testing.assert_array_equal(sample.tiles[i : i + 1], want)


def test_context_end_is_the_first_answer_after_each_picture(tmp_path):
    names = [small.picture(tmp_path, f"{i}.png", 8, 8, i) for i in range(3)]
    conversation = turns("<image>Q", "A", "<image>Q", "B", "R<image>", "C")
    row = {"id": 1, "image": names, "conversations": conversation}
    sample = make_sample(row, str(tmp_path), SPEC)
    assert [TOKENIZER.decode([i]) for i in sample.ids[sample.context_end]] == ["A", "B", "C"]
    late = {"id": 1, "image": names[:1], "conversations": turns("Q", "A", "<image>Q", "B", "R")}
    late["conversations"] += [{"from": "human", "value": "S"}]
    sample = make_sample(late, str(tmp_path), SPEC)
    assert TOKENIZER.decode(sample.ids[sample.context_end]) == "B"


def test_context_of_a_picture_inside_an_answer_ends_right_behind_it(tmp_path):
    name = small.picture(tmp_path, "a.png", 8, 8)
    row = {"id": 1, "image": name, "conversations": turns("Q", "A<image>\nB", "R", "C")}
    sample = make_sample(row, str(tmp_path), SPEC)
    assert sample.context_end.tolist() == [sample.visual_position[-1] + 1]
    asked = {"id": 1, "image": [name, name]}
    asked["conversations"] = [*turns("<image>Q", "A"), {"from": "human", "value": "<image>"}]
    sample = make_sample(asked, str(tmp_path), SPEC)
    assert sample.context_end[1] == len(sample.ids)  # no answer follows


def test_a_prompt_is_the_sample_without_its_last_answer(tmp_path):
    name = small.picture(tmp_path, "a.png", 8, 8)
    row = {"id": 1, "image": name, "conversations": turns("<image>Q", "A", "R", "B")}
    sample, prompt = (f(row, str(tmp_path), SPEC) for f in (make_sample, make_prompt_sample))
    n = len(prompt.ids)
    assert prompt.ids.tolist() == sample.ids[:n].tolist()
    assert TOKENIZER.decode(sample.ids[n:]) == "B\n"
    assert set(prompt.labels.tolist()) == {IGNORE}
    assert prompt.context_end.tolist() == sample.context_end.tolist()  # the answer in the history
    np.testing.assert_array_equal(prompt.tiles, sample.tiles)
    row["conversations"] = turns("<image>Q", "A")
    single = make_prompt_sample(row, str(tmp_path), SPEC)
    assert single.context_end.tolist() == [len(single.ids)]
    row["conversations"] = turns("<image>Q")
    unanswered = make_prompt_sample(row, str(tmp_path), SPEC)
    assert small.key(unanswered) == small.key(single)


def test_prompts_are_never_augmented(tmp_path):
    row = small.row(0, image=small.picture(tmp_path, "a.png", 16, 16))
    strong = dataclasses.replace(SPEC, augmentation=Augmentation(strength=1.0, jitter=1.0))
    plain = make_prompt_sample(row, str(tmp_path), SPEC)
    assert small.key(make_prompt_sample(row, str(tmp_path), strong)) == small.key(plain)


def test_augmentation_is_decided_by_the_generator(tmp_path):
    row = small.row(0, image=small.picture(tmp_path, "a.png", 16, 16))
    spec = dataclasses.replace(SPEC, augmentation=Augmentation(strength=1.0, jitter=1.0))
    a, b, c = (
        make_sample(row, str(tmp_path), spec, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert small.key(a) == small.key(b)
    assert (a.tiles != c.tiles).any()
    assert a.extent == c.extent == make_sample(row, str(tmp_path), SPEC).extent
    with pytest.raises(ValueError, match="random generator"):
        make_sample(row, str(tmp_path), spec)


@pytest.mark.parametrize("dimension", Extent._fields)
def test_what_no_row_can_hold_says_why(tmp_path, dimension):
    row = small.row(0, image=small.picture(tmp_path, "a.png", 16, 16))
    sample = make_sample(row, str(tmp_path), SPEC)
    exact = dataclasses.replace(SPEC, room=sample.extent)
    assert make_sample(row, str(tmp_path), exact).extent == sample.extent
    less = sample.extent._replace(**{dimension: getattr(sample.extent, dimension) - 1})
    with pytest.raises(TooLong, match=dimension) as caught:
        make_sample(row, str(tmp_path), dataclasses.replace(SPEC, room=less))
    assert caught.value.dimension == dimension


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"image": "none.png"}, ImageError, "no such file"),
        ({"image": "../a.png"}, ImageError, "leaves the image root|no such file"),
        ({"image": "broken.png"}, ImageError, "not a readable picture"),
        ({"image": "big.png"}, ImageError, "max_pixels"),
        ({"image": 3}, RowError, "neither a path nor a list"),
        ({"image": ["a.png", None]}, RowError, "neither a path nor a list"),
        ({"image": ["a.png", "a.png"]}, ConversationError, "1 <image> slots in the text for 2"),
        ({"conversations": []}, ConversationError, "empty"),
        ({"conversations": None}, ConversationError, "not a list"),
        ({"conversations": [{"from": "x", "value": ""}]}, ConversationError, "unknown role"),
        ({"video": "a.mp4"}, RowError, "video"),
    ],
)
def test_bad_rows_say_why(tmp_path, changes, error, reason):
    small.picture(tmp_path, "a.png", 8, 8)
    small.picture(tmp_path, "big.png", 40, 40)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "root").mkdir()
    root = tmp_path / "root" if changes.get("image") == "../a.png" else tmp_path
    image = dataclasses.replace(small.IMAGE, max_pixels=1000)
    spec = dataclasses.replace(SPEC, image=image)
    with pytest.raises(error, match=reason):
        make_sample({**small.row(0, image="a.png"), **changes}, str(root), spec)


def test_a_row_survives_json(tmp_path):
    """The other image modes and templates run through the same door."""
    name = small.picture(tmp_path, "a.png", 9, 8)
    row = json.loads(json.dumps(small.row(0, "<image>\nQ", "A", name)))
    square = ImageConfig(aspect_ratio="square")
    spec = dataclasses.replace(SPEC, image=square, template="plain", labels="reference")
    sample = make_sample(row, str(tmp_path), spec)
    assert sample.extent == (4 + 2, 4, 1, 1, 2)
    assert sample.labels.tolist() == [IGNORE] * 4 + sample.ids[4:].tolist()
    assert sample.context_end.tolist() == [4]


class Choose:
    """A generator whose every draw is `index`."""

    def __init__(self, index):
        self.index = index

    def integers(self, n):
        return self.index


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_question_of_a_row_keeps_its_picture_and_drops_the_others(tmp_path, index):
    name = small.picture(tmp_path, "a.png", 12, 6)
    spec = dataclasses.replace(SPEC, one_question=True)
    row = {"image": name, "conversations": turns("<image>\nQ", "A", "R", "B", "S", "C")}
    alone = {"image": name, "conversations": turns(f"<image>\n{'QRS'[index]}", "ABC"[index])}
    got = make_sample(row, str(tmp_path), spec, Choose(index))
    want = make_sample(alone, str(tmp_path), SPEC)
    for name in ("ids", "labels", "visual_position", "tiles", "context_end"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_one_question_leaves_a_literal_slot_of_a_text_row_alone(tmp_path):
    spec = dataclasses.replace(SPEC, one_question=True)
    row = {"conversations": turns("say <image>", "A", "R", "B")}
    want = make_sample({"conversations": turns("say <image>", "A")}, str(tmp_path), SPEC)
    got = make_sample(row, str(tmp_path), spec, Choose(0))
    np.testing.assert_array_equal(got.ids, want.ids)


def test_one_question_draws_all_questions_and_needs_a_generator(tmp_path):
    spec = dataclasses.replace(SPEC, one_question=True)
    row = {"conversations": turns("Q", "A", "R", "B", "S", "C")}
    drawn = {
        tuple(make_sample(row, str(tmp_path), spec, np.random.default_rng(seed)).ids)
        for seed in range(20)
    }
    assert len(drawn) == 3
    with pytest.raises(ValueError, match="random generator"):
        make_sample(row, str(tmp_path), spec)
