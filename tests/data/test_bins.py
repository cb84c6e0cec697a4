"""Batches from bins: one global order for any processes, workers and restarts; books; refusals."""

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path

import binned
import numpy as np
import pytest
import small
from binned import bin_up, close, loaders, take
from test_loader import answers, assert_equal

from cli_jax.data import DataError
from cli_jax.data.pipeline import report
from cli_jax.experiment import ConfigError, EvalConfig, Experiment, SourceConfig, locate

ROWS = 23


@pytest.fixture
def data(tmp_path):
    path = small.write(tmp_path, small.mixed_rows(tmp_path, ROWS))
    return bin_up(small.config(path, augment=0.3, row_length=200), tmp_path / "bins.npz")[0]


def saved(part):
    return json.loads(json.dumps(part.get_state()))


def bins_in(data):
    with np.load(data.bins) as file:
        return len(file["bin_offsets"]) - 1


def test_every_number_of_processes_reads_the_same_global_batches(data):
    want = take(loaders(data), 6)
    assert_equal(take(loaders(data, 2), 6), want)
    assert_equal(take(loaders(data, 4), 6), want)
    assert want[0]["pixel_values"].any()


@pytest.mark.parametrize(("workers", "processes"), [(2, 1), (4, 2)])
def test_workers_change_nothing_and_may_change_in_a_restart(data, workers, processes):
    want = take(loaders(data), 9)
    parts = loaders(dataclasses.replace(data, workers=workers), processes)
    assert_equal(take(parts, 5), want[:5])
    state = saved(parts[0])
    close(parts)
    parts = loaders(dataclasses.replace(data, workers=workers // 2), processes)
    parts[0].set_state(state)
    for part in parts[1:]:
        part.set_state(state)
    assert_equal(take(parts, 2), want[5:7])
    state = saved(parts[0])
    close(parts)
    alone = loaders(data)
    alone[0].set_state(state)
    assert_equal(take(alone, 2), want[7:])


def test_every_epoch_holds_every_sample_once_in_another_order(data):
    bins = bins_in(data)
    drawn = take(loaders(data), 3 * bins)  # of which every `bins` batches are GLOBAL epochs
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in drawn for i in range(4)]
    epochs = [answers(rows[at : at + bins]) for at in range(0, len(rows) - bins + 1, bins)]
    assert len(epochs) == 12
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(ROWS)]
    assert len({tuple(epoch) for epoch in epochs}) > 8
    assert bins % binned.GLOBAL, "an epoch must end within a batch"


def test_the_seed_decides_everything(data):
    a, b, c = (take(loaders(data, seed=seed), 4) for seed in (0, 0, 1))
    assert_equal(a, b)
    assert answers(a) != answers(c)


def test_a_picture_is_changed_anew_in_every_epoch(tmp_path):
    name = small.picture(tmp_path, "a.png", 8, 8)
    path = small.write(tmp_path, [small.row(0, image=name)])
    data, _ = bin_up(small.config(path, augment=1.0), tmp_path / "bins.npz")
    seen = [image.tobytes() for batch in take(loaders(data), 2) for image in batch["pixel_values"]]
    assert len(set(seen)) == 8


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("before", "now"), [(1, 1), (1, 4), (2, 1), (4, 2)])
def test_a_restart_continues_exactly_on_any_number_of_processes(data, after, before, now):
    want = take(loaders(data), after + 4)
    first = loaders(data, before)
    take(first, after)
    states = [saved(part) for part in first]
    assert all(state["stream"] == {"batch": after} for state in states)
    second = loaders(data, now)
    take(second, 2)  # whatever it did before
    for index, part in enumerate(second):
        part.set_state(states[index] if before == now else states[0])
    assert_equal(take(second, 4), want[after:])
    if before == now:
        take(first, 4)
        assert [saved(part) for part in second] == [saved(part) for part in first]


def test_a_row_that_went_bad_becomes_padding_and_is_counted_once(data, tmp_path, caplog):
    whole = take(loaders(data), 6)
    (tmp_path / "p4_0.png").unlink()
    (tmp_path / "p8_1.png").write_bytes((tmp_path / "p8_1.png").read_bytes()[:60])
    data = dataclasses.replace(data, max_bad_share=0.5)
    parts = loaders(data, 2)
    with caplog.at_level(logging.WARNING):
        left = take(parts, 6)
    lost = Counter(answers(whole)) - Counter(answers(left))
    assert lost.keys() == {"4", "8"}
    assert not Counter(answers(left)) - Counter(answers(whole))
    tokens = [sum((batch["segment_ids"] > 0).sum() for batch in each) for each in (whole, left)]
    assert tokens[1] < tokens[0]
    # The samples that remain are bit for bit what they would have been.
    keys = [Counter(small.key(s) for b in each for s in small.unpack(b)) for each in (whole, left)]
    assert not keys[1] - keys[0]
    told = [report(part.get_state()) for part in parts]
    assert max(each["skipped"]["image"] for each in told) == 2
    assert sum(each["drawn"] - each["used"] for each in told) == sum(lost.values()) > 4
    booked = sum(each["skipped_rows"] for each in told)
    assert len(caplog.records) == booked <= 2 * len(parts)  # a row once per process
    # A restart does not count them again.
    caplog.clear()
    again = loaders(data, 2)
    for part, state in zip(again, map(saved, parts), strict=True):
        part.set_state(state)
    take(again, 6)
    assert not caplog.records
    assert [report(p.get_state())["skipped"] for p in again] == [each["skipped"] for each in told]


def test_a_sample_that_has_grown_becomes_padding(data, tmp_path):
    for picture in tmp_path.glob("p*_0.png"):
        small.picture(tmp_path, picture.name, 16, 16)  # one tile became five
    parts = loaders(dataclasses.replace(data, max_bad_share=1.0))
    take(parts, 12)  # and no batch overflows
    told = report(parts[0].get_state())
    assert told["skipped"]["grown"] == told["skipped_rows"] > 1


def test_too_many_bad_rows_stop_the_loader(data, tmp_path):
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"more than data\.max_bad_share"):
        take(loaders(data), 6)


def test_a_state_of_other_settings_is_refused(data, tmp_path):
    state = saved(loaders(data)[0])
    online = dataclasses.replace(data, bins="")
    with pytest.raises(ConfigError, match=r"data\.bins was '\w{16}' and is ''\. Restore"):
        loaders(online)[0].set_state(state)
    with pytest.raises(ConfigError, match=r"data\.bins was '' and is '\w{16}'\. Restore"):
        loaders(data)[0].set_state(saved(loaders(online)[0]))
    other, _ = bin_up(online, tmp_path / "other.npz", seed=1)
    with pytest.raises(ConfigError, match=r"data\.bins was '\w{16}' and is '\w{16}'\. Restore"):
        loaders(other)[0].set_state(state)
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        loaders(data, seed=1)[0].set_state(state)
    with pytest.raises(ConfigError, match=r"augment was 0\.3 and is 0\.0"):
        loaders(dataclasses.replace(data, augment=0.0))[0].set_state(state)
    batches = binned.make_loader(
        data, small.IMAGE, small.VISION, seed=0, rows_per_process=2, tokenizer=binned.TOKENIZER
    )
    with pytest.raises(ConfigError, match=r"data\.batch_size was 4 and is 2"):
        batches.set_state(state)


def test_only_bins_go_on_with_another_number_of_processes(data):
    assert loaders(data)[0].any_process_count
    online = dataclasses.replace(data, bins="")
    assert not loaders(online)[0].any_process_count
    with pytest.raises(ConfigError, match=r"process was \[0, 2\] and is \[0, 1\]"):
        loaders(online)[0].set_state(saved(loaders(online, 2)[0]))


def test_bins_of_other_data_or_settings_are_refused(data, tmp_path):
    source = data.train[0]
    for changes, named in [
        ({"row_length": 201}, r"row was \[200, 48, 8, 4, 200\] and is \[201, 48, 8, 4, 201\]"),
        ({"template": "question_first"}, r"data\.template was 'qwen_1_5' and is"),
        ({"turns": "one"}, r"data\.turns was 'all' and is 'one'"),
        ({"train": (dataclasses.replace(source, stop=9),)}, r"data\.train\[0\]\.stop was 23 and"),
        ({"train": (dataclasses.replace(source, weight=2.0),)}, r"data\.train\[0\]\.weight was"),
        ({"train": (source, source)}, r"number of files in data\.train was 1 and is 2"),
        ({"pack": False}, r"data\.pack was True and is False"),
    ]:
        with pytest.raises(ConfigError, match=named) as caught:
            loaders(dataclasses.replace(data, **changes))
        assert "cli_jax.data.prepare" in str(caught.value)
    image = dataclasses.replace(small.IMAGE, aspect_ratio="anyres_max_2")
    with pytest.raises(ConfigError, match=r"model\.image\.aspect_ratio was 'anyres_max_4' and is"):
        loaders(data, image=image)
    take(loaders(dataclasses.replace(data, labels="reference", jitter=0.1)), 1)  # change no length

    text = (tmp_path / "train.json").read_text()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "rows.json").write_text(text)
    moved = SourceConfig(str(tmp_path / "moved" / "rows.json"), str(tmp_path))
    assert_equal(
        take(loaders(dataclasses.replace(data, train=(moved,))), 2), take(loaders(data), 2)
    )
    (tmp_path / "train.json").write_text(text.replace('"r1"', '"rX"'))
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.sha256 was"):
        loaders(data)


def test_a_relative_path_starts_in_the_root(data):
    base = Experiment(
        name="", model=None, data=dataclasses.replace(data, root="/r", bins="b.npz"),
        optimizer=None, mesh=None, compute=None, checkpoint=None, log=None, eval=EvalConfig(),
    )  # fmt: skip
    assert locate(base, "run").data.bins == "/r/b.npz"
    online = dataclasses.replace(base, data=dataclasses.replace(base.data, bins=""))
    assert locate(online, "run").data.bins == ""


def test_a_missing_or_damaged_file_is_named(data, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.npz does not exist; make it with `python -m"):
        loaders(dataclasses.replace(data, bins=str(tmp_path / "none.npz")))
    content = Path(data.bins).read_bytes()
    for damaged in (content[:100], b"", content[: len(content) // 2]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"bad\.npz is damaged"):
            loaders(dataclasses.replace(data, bins=str(tmp_path / "bad.npz")))
    np.savez(
        tmp_path / "bad.npz", bin_offsets=[0, 9], source=[0], row=[0], metadata='{"settings":1}'
    )
    with pytest.raises(DataError, match=r"bad\.npz is damaged \(its offsets"):
        loaders(dataclasses.replace(data, bins=str(tmp_path / "bad.npz")))
