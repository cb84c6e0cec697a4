"""No picture is in two splits, and what is written is what was cut."""

import json
import os

import pytest
from compare_tiny import TRAIN, config, turn, write_data

from cli_jax.compare import splits
from cli_jax.compare.config import from_config
from cli_jax.experiment import ConfigError


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def cut(data, tmp_path, **compare):
    comparison = from_config(config(data, **compare), tmp_path)
    return comparison, splits.cut(comparison)


def rows(cut, name):
    return [json.loads(line) for line in cut.files[name].splitlines()]


def pictures(cut, name, root):
    return {os.path.join(root, row["image"]) for row in rows(cut, name)}


def test_train_held_out_and_evaluation_share_no_picture(data, tmp_path):
    _, found = cut(data, tmp_path, fractions=[1.0, 0.5])
    train, held_out = (
        pictures(found, "train_1_0.jsonl", data),
        pictures(found, "held_out.jsonl", "/"),
    )
    val = {data / row["image"] for row in json.loads((data / "val.json").read_text())}
    assert len(held_out) == 4 == TRAIN // 5
    assert len(train) == TRAIN - 4
    assert not train & held_out
    assert not (train | held_out) & set(map(str, val))
    assert train | held_out == {str(path) for path in (data / "train").iterdir()}
    half = pictures(found, "train_0.5_0.jsonl", data)
    assert half < train
    assert len(half) == len(train) // 2


def test_a_held_out_row_becomes_a_question_each(data, tmp_path):
    _, found = cut(data, tmp_path)
    asked = rows(found, "held_out.jsonl")
    assert len(asked) == 8
    first = asked[0]["conversations"]
    assert [t["from"] for t in first] == ["human", "gpt"]
    assert first[0]["value"] == "<image>\nWhich color?"
    assert asked[1]["conversations"][0]["value"] == "<image>\nHow many?"
    assert len({row["id"] for row in asked}) == 8
    noted = json.loads(found.files["held_out_pictures.json"])
    assert [name.lstrip("/") for name in noted["pictures"]] == [row["image"] for row in asked]
    _, fewer = cut(data, tmp_path, held_out={"share": 0.2, "questions": 1})
    assert len(rows(fewer, "held_out.jsonl")) == 4


def test_the_seed_of_the_split_decides_and_nothing_else(data, tmp_path):
    files = [
        cut(data, tmp_path, **change)[1].files for change in ({}, {"seeds": [5]}, {"split_seed": 1})
    ]
    assert files[0] == files[1]
    assert files[0]["held_out.jsonl"] != files[2]["held_out.jsonl"]


def test_variants_of_a_scene_stay_together(data, tmp_path):
    scene = r"scene\d+"
    _, found = cut(data, tmp_path, held_out={"share": 0.3, "together": scene}, fractions=[0.5])
    parts = [
        {row["image"].rsplit("/", 1)[-1].split("-")[0] for row in rows(found, name)}
        for name in ("train_0.5_0.jsonl", "held_out.jsonl")
    ]
    assert not parts[0] & parts[1]
    assert len(rows(found, "train_0.5_0.jsonl")) == 2 * len(parts[0])
    # 6 val pictures of 3 scenes are 3 things to draw.
    assert found.report["evals"]["val"]["pictures"] == 6
    assert len(set(json.loads(found.files["val_pictures.json"])["pictures"])) == 3
    with pytest.raises(ConfigError, match=r"together='meter' does not match"):
        cut(data, tmp_path, held_out={"share": 0.3, "together": "meter"})


def add_row(data, name, image):
    path = data / name
    talk = turn("<image>\n" * (1 if isinstance(image, str) else len(image)) + "Which color?", "red")
    content = [*json.loads(path.read_text()), {"id": "new", "image": image, "conversations": talk}]
    path.write_text(json.dumps(content))


def test_an_evaluation_picture_that_was_trained_on_is_refused(data, tmp_path):
    add_row(data, "val.json", "train/../train/scene0-0.png")
    with pytest.raises(
        ConfigError, match=r"scene0-0.png is in the training data and in .*val.json"
    ):
        cut(data, tmp_path)


def test_a_picture_in_rows_that_would_be_separated_is_refused(data, tmp_path):
    for i in range(10):
        add_row(data, "train.json", [f"train/scene{i}-0.png", f"train/scene{i}-1.png"])
    with pytest.raises(ConfigError, match="would be held out in one row and trained on in another"):
        cut(data, tmp_path)


def test_rows_of_one_picture_are_one_unit(data, tmp_path):
    for i in range(10):
        add_row(data, "train.json", f"train/scene{i}-0.png")
    _, found = cut(data, tmp_path)
    report = found.report["train"]["1"]
    train = rows(found, "train_1_0.jsonl")
    assert report["pictures"] == TRAIN - 4 == len({row["image"] for row in train})
    assert report["rows"] == len(train) > TRAIN - 4


def test_several_files_keep_their_rows_and_weights(data, tmp_path):
    content = json.loads((data / "train.json").read_text())
    (data / "a.json").write_text(json.dumps(content[::2]))
    (data / "b.json").write_text(json.dumps(content[1::2]))
    changed = config(data)
    changed["data"]["train"] = [{"path": "a.json", "weight": 2.0}, {"path": "b.json"}]
    comparison = from_config(changed, tmp_path)
    found = splits.cut(comparison)
    splits.write(found, tmp_path)
    sources = splits.train_sources(comparison, tmp_path, 1.0)
    assert [(source.weight, source.image_root) for source in sources] == [
        (2.0, str(data)),
        (1.0, str(data)),
    ]
    for source, original in zip(sources, (content[::2], content[1::2]), strict=True):
        with open(source.path) as file:
            ids = {json.loads(line)["id"] for line in file}
        assert ids < {row["id"] for row in original}


def test_nothing_may_be_empty(data, tmp_path):
    with pytest.raises(ConfigError, match=r"held_out.share=0.01 of 20 pictures"):
        cut(data, tmp_path, held_out={"share": 0.01})
    with pytest.raises(ConfigError, match=r"has no category 'shape'; it has \['color', 'count'\]"):
        cut(data, tmp_path, evals=[{"name": "val", "path": "val.json", "categories": ["shape"]}])
