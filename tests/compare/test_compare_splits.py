"""No picture is in two splits, and what is written is what was cut."""

import json
import os

import pytest
from compare_tiny import TRAIN, config, turn, write_data

from cli_jax.compare import splits
from cli_jax.compare.config import from_config
from cli_jax.data.sources import open_sources
from cli_jax.experiment import ConfigError


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def cut(data, tmp_path, held_out=0.2, scene="", **compare):
    changed = config(data, **compare)
    changed["data"] |= {"held_out": held_out, "scene": scene}
    comparison = from_config(changed, tmp_path)
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
    noted = json.loads(found.files["held_out_scenes.json"])
    assert [str(data / name).lstrip("/") for name in noted["scenes"]] == [
        row["image"] for row in asked
    ]
    _, fewer = cut(data, tmp_path, held_out_questions=1)
    assert len(rows(fewer, "held_out.jsonl")) == 4


def test_the_split_depends_on_the_scenes_and_nothing_else(data, tmp_path):
    _, found = cut(data, tmp_path)
    path = data / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    _, again = cut(data, tmp_path, seeds=[5])
    for name in ("train_1_0.jsonl", "held_out.jsonl"):
        assert pictures(found, name, "/") == pictures(again, name, "/")


def name_ids_by_pictures(data):
    """train/scene3-1.png becomes the id scene3-1, and in val.json scene3-1-color."""
    for name in ("train.json", "val.json"):
        content = json.loads((data / name).read_text())
        for row in content:
            end = f"-{row['category']}" if "category" in row else ""
            row["id"] = row["image"].rsplit("/", 1)[-1].removesuffix(".png") + end
        (data / name).write_text(json.dumps(content))


def test_variants_of_a_scene_stay_together(data, tmp_path):
    name_ids_by_pictures(data)
    _, found = cut(data, tmp_path, held_out=0.3, scene=r"-\d(-[a-z]+)?$", fractions=[0.5])
    parts = [
        {row["id"].split("-")[0] for row in rows(found, name)}
        for name in ("train_0.5_0.jsonl", "held_out.jsonl")
    ]
    assert not parts[0] & parts[1]
    assert len(rows(found, "train_0.5_0.jsonl")) == 2 * len(parts[0])
    # 6 val pictures of 3 scenes are 3 things to draw.
    assert found.report["evals"]["val"]["pictures"] == 6
    assert set(json.loads(found.files["val_scenes.json"])["scenes"]) == {
        *("scene10", "scene11", "scene12")
    }


def test_pretraining_on_the_same_data_holds_out_the_same_pictures(data, tmp_path):
    name_ids_by_pictures(data)
    comparison, found = cut(data, tmp_path, scene=r"-\d$")
    ((file,), _, _) = open_sources(comparison.base.data, "held_out")
    held_out = {str(data / file[i]["image"]) for i in range(len(file))}
    assert len(held_out) == 4
    assert held_out == pictures(found, "held_out.jsonl", "/")


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
    with pytest.raises(ConfigError, match=r"held_out=0.99 leaves no row of .* to train on"):
        cut(data, tmp_path, held_out=0.99)
    with pytest.raises(ConfigError, match=r"held_out is 0: selections .* need held-out pictures"):
        cut(data, tmp_path, held_out=0)
    with pytest.raises(ConfigError, match=r"has no category 'shape'; it has \['color', 'count'\]"):
        cut(data, tmp_path, evals=[{"name": "val", "path": "val.json", "categories": ["shape"]}])
