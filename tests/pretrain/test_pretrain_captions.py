"""What captions say and leave out, and which scenes are held out."""

import dataclasses
import pickle
import random

import pretrain_small
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_jax.data.captions import caption, caption_row
from cli_jax.data.facts import BOXES, WORDS, Fact, facts
from cli_jax.data.parts import held_out_scenes, scene_of
from cli_jax.data.sources import DataError, open_sources
from cli_jax.experiment import ConfigError
from cli_jax.text import ConversationError


def row(*pairs):
    return {"id": "r", "image": "p.png", "conversations": pretrain_small.talk(pairs)}


BOX_ROW = row(
    ("How many small objects are in the right box?", 2),
    ("How many objects are in the left box?", 3),
    ("How many yellow objects are in the left box?", 0),
    ("How many circles are in the left box?", 1),
    ("How many black objects are in the left box?", 2),
    ("How many tall objects are in the left box?", 7),
    ("How many blue objects are in the right box?", 1),
)
METER_ROW = row(
    ("What is the first digit from the left?", 2), ("What is the full reading?", "27009")
)


def test_facts_of_boxes():
    assert facts(BOX_ROW) == [
        Fact("size", "small", 2, 3, 2),
        Fact("all", "objects", 0, 3, 3),
        Fact("colour", "yellow", 0, 3, 0),
        Fact("shape", "circles", 0, 3, 1),
        Fact("colour", "black", 0, 3, 2),
        Fact("colour", "blue", 2, 3, 1),
    ]


def test_facts_of_a_meter():
    assert facts(METER_ROW) == [Fact("digit", "digit", i, 5, int(d)) for i, d in enumerate("27009")]


@pytest.mark.parametrize(
    ("given_row", "kind", "text"),
    [
        (BOX_ROW, "coarse", "left box: 3 objects, black, no yellow; right box: blue"),
        (
            BOX_ROW,
            "full",
            "left box: 3 objects, 2 black, no yellow, 1 circles; right box: 1 blue, 2 small",
        ),
        (METER_ROW, "coarse", "about 27 thousand"),
        (METER_ROW, "full", "reading 27009"),
    ],
)
def test_captions(given_row, kind, text):
    captioned = caption_row(given_row, kind)
    assert captioned["conversations"] == [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": text},
    ]
    assert (captioned["id"], captioned["image"]) == ("r", "p.png")


counts = st.dictionaries(
    st.tuples(st.sampled_from([w for words in WORDS.values() for w in words]), st.integers(0, 2)),
    st.integers(0, 8),
    min_size=1,
)


@given(counts)
def test_a_coarse_caption_does_not_depend_on_what_it_leaves_out(known):
    """Shapes, sizes and counts by color change `full`, never `coarse`."""
    category = {word: name for name, words in WORDS.items() for word in words}

    def all_facts(change):
        each = [(word, place, change(word, n)) for (word, place), n in known.items()]
        return [Fact(category[word], word, place, 3, n) for word, place, n in each]

    def more(word, n):
        return n if word == "objects" or not n else n + 1

    told = all_facts(lambda word, n: n)
    blurred = [f for f in all_facts(more) if f.category in ("all", "colour")]
    if not blurred:
        with pytest.raises(ConversationError, match="no question of the row"):
            caption(told, "coarse")
        return
    assert caption(told, "coarse") == caption(blurred, "coarse")
    if any(more(word, n) != n for (word, _), n in known.items()):
        assert caption(told, "full") != caption(all_facts(more), "full")
    for box in BOXES:
        assert (f"{box} box" in caption(told, "full")) == any(
            place == BOXES.index(box) for _, place in known
        )


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([("What is this?", 3)], "no question about counts"),
        ([("How many objects are in the left box?", "three")], "'three' is not a number"),
        ([("What is the full reading?", "2700")], "has not 5 digits"),
    ],
)
def test_rows_without_a_caption_say_why(pairs, reason):
    with pytest.raises(ConversationError, match=reason):
        caption_row(row(*pairs), "full")


def test_scenes_are_held_out_whole_and_whatever_the_order(tmp_path):
    pretrain_small.write_data(tmp_path, scenes=20)
    data = pretrain_small.experiment(tmp_path).data
    ids = {}
    for part in ("train", "held_out"):
        ((file,), ((start, stop),), _) = open_sources(data, part)
        travelled = pickle.loads(pickle.dumps(file))
        assert (start, stop) == (0, len(file))
        ids[part] = [travelled[i]["id"] for i in range(stop)]
        assert all(" box: " in travelled[i]["conversations"][1]["value"] for i in range(stop))
    assert sorted(ids["train"] + ids["held_out"]) == sorted(
        f"s{scene}-{i}" for scene in range(20) for i in range(2)
    )
    scenes = {part: {name[:-2] for name in names} for part, names in ids.items()}
    assert not scenes["train"] & scenes["held_out"]
    assert len(scenes["held_out"]) == 4
    shuffled = [f"s{i}" for i in range(20)] * 2
    random.Random(1).shuffle(shuffled)
    assert held_out_scenes(shuffled, 0.2) == scenes["held_out"]


def test_a_scene_of_two_files_is_held_out_of_both(tmp_path):
    pretrain_small.write_data(tmp_path, scenes=20)
    data = pretrain_small.experiment(tmp_path).data
    (source,) = data.train
    halves = [dataclasses.replace(source, start=a, stop=b) for a, b in ((0, 24), (16, 40))]
    data = dataclasses.replace(data, train=tuple(halves))
    scenes = {}
    for part in ("train", "held_out"):
        files, _, _ = open_sources(data, part)
        scenes[part] = {file[i]["id"][:-2] for file in files for i in range(len(file))}
        assert all(len(file) for file in files)
    assert not scenes["train"] & scenes["held_out"]
    own = [held_out_scenes([f"s{i}" for i in at], 0.2) for at in (range(12), range(8, 20))]
    assert own[0] != own[1]  # cut by themselves, one would have trained on what the other held out
    assert scenes["held_out"] == own[0] | own[1]


def test_rows_are_cut_before_scenes_are_held_out(tmp_path):
    pretrain_small.write_data(tmp_path, scenes=20)
    data = pretrain_small.experiment(tmp_path).data
    source = dataclasses.replace(data.train[0], start=10, stop=30)
    data = dataclasses.replace(data, train=(source,), captions="")
    ids = {}
    for part in ("train", "held_out"):
        ((file,), _, _) = open_sources(data, part)
        ids[part] = [file[i]["id"] for i in range(len(file))]
    inside = [f"s{scene}" for scene in range(5, 15)]
    assert {name[:-2] for name in ids["held_out"]} == held_out_scenes(inside, 0.2)
    assert sorted(ids["train"] + ids["held_out"]) == sorted(
        f"s{scene}-{i}" for scene in range(5, 15) for i in range(2)
    )


def test_scenes_of_ids():
    assert scene_of({"id": "hidden-1181-0-5"}, r"-\d$") == "hidden-1181-0"
    assert scene_of({"id": "collected_lcd-0012"}, r"-\d$") == "collected_lcd-0012"
    assert scene_of({"id": "collected_lcd-0012"}, r"-\d+$") == "collected_lcd"
    assert scene_of({"id": "any-1"}, "") == "any-1"
    assert scene_of({"id": "any-1", "image": "some.png"}, "") == "some.png"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"held_out": 1.5}, "held_out=1.5 is not a share"),
        ({"scene": "("}, r"scene='\(' is not a regular expression"),
        ({"scene": ".*"}, "leaves no row of .*train.json to train on"),
    ],
)
def test_unusable_settings_are_named(tmp_path, changes, reason):
    pretrain_small.write_data(tmp_path, scenes=4)
    data = pretrain_small.experiment(tmp_path, data=changes).data
    with pytest.raises((ConfigError, DataError), match=reason):
        open_sources(data)
