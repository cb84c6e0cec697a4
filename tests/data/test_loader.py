"""The pipeline without workers: order, mixture, shards, bad rows, and exact state."""

import dataclasses
import itertools
import json
import logging
from collections import Counter

import numpy as np
import pytest
import small

from cli_jax.data import DataError
from cli_jax.data.pipeline import make_loader, report
from cli_jax.experiment import ConfigError, DataConfig, SourceConfig

TOKENIZER = small.tokenizer()


def loader(data, seed=0, rows=2, **more):
    return make_loader(
        data, small.IMAGE, small.VISION, seed=seed, rows_per_process=rows, tokenizer=TOKENIZER,
        **more,
    )  # fmt: skip


def take(batches, n):
    return list(itertools.islice(batches, n))


def answers(batches):
    """The answers of all samples, in order: rows are told apart by them."""
    found = []
    for batch in batches:
        for sample in small.unpack(batch):
            labels = sample.labels[sample.labels >= 0]
            found.append(TOKENIZER.decode(labels))
    return found


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def rows12(tmp_path):
    return small.write(tmp_path, small.mixed_rows(tmp_path, 12))


def test_batches_have_the_shapes_of_the_config(rows12):
    batch = next(loader(small.config(rows12), rows=3))
    assert batch["input_ids"].shape == (3, 256)
    assert batch["pixel_values"].shape == (3, 8, 8, 8, 3)
    assert batch["plan_index"].shape == (3, 48, 4)
    assert batch["plan_inverse"].shape == (3, 32, 4)
    assert batch["image_segment"].shape == (3, 4)
    assert (batch["segment_ids"].max(1) > 1).all()  # packed


def test_every_epoch_holds_every_row_once_in_another_order(rows12):
    data = small.config(rows12, pack=False)
    drawn = answers(take(loader(data), 18))
    epochs = [drawn[i : i + 12] for i in (0, 12, 24)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(12)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0], key=int)


def test_packing_changes_the_rows_and_not_the_samples(rows12):
    alone = take(loader(small.config(rows12, pack=False)), 90)
    packed = take(loader(small.config(rows12)), 20)
    one = Counter(small.key(s) for b in alone for s in small.unpack(b))
    many = Counter(small.key(s) for b in packed for s in small.unpack(b))
    assert one.keys() == many.keys()
    assert len(one) == 12
    total = sum(many.values())
    assert total > 1.5 * 40
    # Up to the rows that are still open, every sample has come equally often.
    assert max(many.values()) - min(many.values()) <= 5


def test_the_seed_decides_everything(rows12):
    data = small.config(rows12, augment=0.5)
    a, b, c = (take(loader(data, seed), 4) for seed in (0, 0, 1))
    assert_equal(a, b)
    assert answers(a) != answers(c)


def test_augmentation_differs_between_epochs_and_processes(folder):
    name = small.picture(folder, "a.png", 8, 8)
    path = small.write(folder, [small.row(0, image=name)])
    data = small.config(path, pack=False, augment=1.0)
    both = [loader(data, rows=4, process_index=p, process_count=2) for p in (0, 1)]
    seen = [image.tobytes() for part in both for image in next(part)["pixel_values"]]
    assert len(set(seen)) == 8


def test_rows_are_cut_before_they_are_shuffled(rows12):
    data = small.config(SourceConfig(rows12, start=3, stop=7), pack=False)
    drawn = answers(take(loader(data), 12))
    assert set(drawn) == {"3", "4", "5", "6"}
    assert Counter(drawn) == dict.fromkeys("3456", 6)


def test_the_mixture_is_exact(folder):
    paths = [small.write(folder, small.mixed_rows(folder, 5, s), f"{s}.jsonl") for s in (0, 50)]
    data = small.config(
        SourceConfig(paths[0], weight=0.75), SourceConfig(paths[1], weight=0.25), pack=False
    )
    drawn = [int(answer) >= 50 for answer in answers(take(loader(data, rows=8), 5))]
    assert sum(drawn) == 10
    for start in range(0, 40, 4):  # in every stretch, not only on average
        assert sum(drawn[start : start + 4]) == 1


def test_processes_share_the_stream_without_overlap(rows12):
    data = small.config(rows12, pack=False)
    whole = answers(take(loader(data, rows=1), 24))
    parts = [
        answers(take(loader(data, rows=1, process_index=p, process_count=3), 8)) for p in range(3)
    ]
    assert [parts[i % 3][i // 3] for i in range(24)] == whole
    first = [set(part[:4]) for part in parts]  # an epoch of 12 rows: disjoint and covering
    assert set.union(*first) == {str(i) for i in range(12)}
    assert sum(map(len, first)) == 12


def test_a_data_set_smaller_than_a_batch_repeats(folder):
    path = small.write(folder, [small.row(0, "Q", "5")])
    batch = next(loader(small.config(path), rows=4))
    assert set(answers([batch])) == {"5"}
    assert len(small.unpack(batch)) >= 4


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_restored_loader_continues_exactly(rows12, pack, after):
    data = small.config(rows12, pack=pack, augment=0.3)
    first = loader(data)
    take(first, after)
    state = json.loads(json.dumps(first.get_state()))
    want = take(first, 5)
    second = loader(data)
    take(second, 2)  # whatever it did before
    second.set_state(state)
    assert second.get_state() == state
    assert_equal(take(second, 5), want)
    assert second.get_state() == first.get_state()


def test_a_state_in_the_middle_of_a_batch_is_exact(folder):
    """Many drops make the worker report without a batch, with closed rows still waiting."""
    rows = small.mixed_rows(folder, 4) + [small.row(i, image="none.png") for i in range(4, 40)]
    path = small.write(folder, rows)
    data = small.config(path, pack=False, max_bad_share=1.0)
    loaders = [loader(data, rows=8) for _ in range(2)]
    first, second = (each._parent for each in loaders)
    for _ in range(20):
        element = next(first)
        state = json.loads(json.dumps(first.get_state()))
        if not element["batch"] and state["closed"]:
            break
    assert not element["batch"]
    assert state["closed"] > 0
    second.set_state(state)
    assert second.get_state() == state
    want, got = next(first), next(second)
    assert got["tally"] == want["tally"]
    assert_equal([got["batch"]], [want["batch"]])


def test_a_state_of_other_settings_is_refused(rows12):
    data = small.config(rows12)
    state = loader(data).get_state()
    for other, name in [
        ({"data": dataclasses.replace(data, row_length=200)}, "row was"),
        ({"data": dataclasses.replace(data, pack=False)}, "data.pack was True and is False"),
        ({"data": small.config(SourceConfig(rows12, stop=11))}, "data.train was"),
        ({"data": dataclasses.replace(data, workers=2)}, "data.workers was 0 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"rows": 4}, "rows_per_process was 2 and is 4"),
        ({"process_count": 2}, "process was"),
    ]:
        with pytest.raises(ConfigError, match=name):
            loader(**{"data": data, **other}).set_state(state)


BAD = {
    "none.png": "image",
    "broken.png": "image",
    "../outside.png": "image",
    "big.png": "image",
}


@pytest.fixture
def bad_rows(folder):
    """Ten good rows and one of each kind of bad row."""
    root = folder / "root"
    rows = small.mixed_rows(root, 10)
    small.picture(folder, "outside.png", 8, 8)
    small.picture(root, "big.png", 100, 100)
    (root / "broken.png").write_bytes((root / "p1_0.png").read_bytes()[:60])
    rows += [small.row(name, image=name) for name in BAD]
    rows += [
        {"id": "empty", "conversations": []},
        {"id": "robot", "conversations": [{"from": "robot", "value": "A"}]},
        small.row("slots", "<image><image>", image="p1_0.png"),
        small.row("video", video="a.mp4"),
        ["no mapping"],
        small.row("long", "Q" * 300),
    ]
    return SourceConfig(small.write(folder, rows), str(root))


def test_bad_rows_are_skipped_counted_once_and_logged_with_id_and_reason(bad_rows, caplog):
    image = dataclasses.replace(small.IMAGE, max_pixels=1000)
    data = small.config(bad_rows, pack=False, max_bad_share=0.5)
    batches = make_loader(
        data, image, small.VISION, seed=0, rows_per_process=2, tokenizer=TOKENIZER
    )
    with caplog.at_level(logging.INFO):
        drawn = answers(take(batches, 25))  # five epochs
    assert Counter(drawn) == {str(i): 5 for i in range(10)}
    told = report(batches.get_state())
    assert told["skipped"] == {"image": 4, "conversation": 3, "row": 2}
    assert told["too_long"] == {"tokens": 1}
    assert (told["skipped_rows"], told["too_long_rows"]) == (9, 1)
    assert told["drawn"] - told["used"] > 30
    messages = [record.getMessage() for record in caplog.records]
    for row_id, reason in [
        ("rnone.png", "no such file"),
        ("rbroken.png", "not a readable picture"),
        ("r../outside.png", "leaves the image root"),
        ("rbig.png", "max_pixels=1000"),
        ("empty", "the conversation is empty"),
        ("robot", "unknown role 'robot'"),
        ("rslots", "2 <image> slots in the text for 1 images"),
        ("rvideo", "video"),
        ("", "not a mapping"),
        ("rlong", "tokens do not fit a row of 256"),
    ]:
        assert sum(f"(id {row_id!r})" in m and reason in m for m in messages) == 1, row_id


def test_counters_continue_after_a_restore(bad_rows, caplog):
    data = small.config(bad_rows, max_bad_share=0.5)
    first = loader(data)
    take(first, 12)
    state = json.loads(json.dumps(first.get_state()))
    second = loader(data)
    second.set_state(state)
    caplog.clear()
    take(second, 12)
    assert not caplog.records  # known rows are not logged again
    take(first, 12)
    assert report(second.get_state()) == report(first.get_state())
    assert report(state)["rows"] == 24
    assert report(second.get_state())["rows"] == 48


def test_too_large_a_share_of_bad_rows_is_an_error(bad_rows):
    with pytest.raises(DataError, match=r"rows cannot be used, more than data.max_bad_share = 0.2"):
        take(loader(small.config(bad_rows, max_bad_share=0.2)), 30)


def test_strict_stops_at_the_first_bad_row(bad_rows):
    with pytest.raises(DataError, match=r"data.strict is set"):
        take(loader(small.config(bad_rows, max_bad_share=1.0, strict=True)), 30)


def test_data_without_a_usable_row_ends_in_an_error_instead_of_silence(folder):
    path = small.write(folder, [small.row(i, image=f"{i}.png") for i in range(200)])
    broken = loader(small.config(path, max_bad_share=1.0))
    with pytest.raises(
        DataError, match=r"(?s)none of the first \d+ rows drawn can be used.*no such"
    ):
        next(broken)
    with pytest.raises(ValueError, match="closed"):
        next(broken)
    long = small.write(folder, [small.row(i, "Q" * 300) for i in range(3)], "long.json")
    with pytest.raises(DataError, match=r"(?s)check image_root and data.row_length.*do not fit"):
        next(loader(small.config(long)))


def test_a_programming_error_is_not_swallowed(rows12):
    image = dataclasses.replace(small.IMAGE, aspect_ratio="nonsense")
    batches = make_loader(
        small.config(rows12), image, small.VISION, seed=0, rows_per_process=2, tokenizer=TOKENIZER
    )
    with pytest.raises(ValueError, match="nonsense") as caught:
        take(batches, 9)
    assert any("train.json" in note for note in caught.value.__notes__)


def test_the_prompt_context_is_checked_on_request(rows12):
    data = small.config(rows12, labels="reference")
    take(loader(data), 2)
    with pytest.raises(ConfigError, match=r"data.labels=answer_only"):
        take(loader(data, prompt_context=True), 4)
    take(loader(small.config(rows12), prompt_context=True), 4)


def test_unusable_settings_are_named(rows12, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        loader(DataConfig())
    with pytest.raises(ConfigError, match="12 rows: start = 5, stop = 13"):
        loader(small.config(SourceConfig(rows12, start=5, stop=13)))
    with pytest.raises(ConfigError, match=r"weight 0\.0 is not positive"):
        loader(small.config(SourceConfig(rows12, weight=0.0)))
    with pytest.raises(ConfigError, match="rows_per_process = 0"):
        loader(small.config(rows12), rows=0)
    with pytest.raises(DataError, match="does not exist"):
        loader(small.config(str(tmp_path / "no.json")))
    with pytest.raises(ConfigError, match="no folder or hub id"):
        make_loader(small.config(rows12), small.IMAGE, small.VISION, seed=0, rows_per_process=1)
