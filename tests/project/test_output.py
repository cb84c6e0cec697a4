"""Files of results are whole or not there, and a full disk is one message."""

import errno
import json

import numpy as np
import pytest
from etils import epath

from cli_jax.experiment import ConfigError, load
from cli_jax.output import (
    OutputError,
    read_json,
    writable_folder,
    write_arrays,
    write_file,
    write_json,
    write_lines,
)
from cli_jax.train.workdir import read_lines


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes empty files and nothing else, as a full one does."""
    really = type(epath.Path("x")).write_bytes

    def write_bytes(self, data):
        if data:
            really(self, b"")
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(self, data)

    monkeypatch.setattr(type(epath.Path("x")), "write_bytes", write_bytes)


def test_a_file_replaces_an_older_one_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    write_json(path, {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}


def test_lines_and_arrays_read_back(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"n": 1}, {"n": 2}])
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"n": 1}, {"n": 2}]
    write_arrays(tmp_path / "a.npz", x=np.arange(3), name="b")
    with np.load(tmp_path / "a.npz") as found:
        assert found["x"].tolist() == [0, 1, 2]
        assert str(found["name"]) == "b"


def test_a_full_disk_keeps_what_was_there_and_is_one_message(tmp_path, full_disk):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*results\.json: No space left.*Free"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_is_noticed_before_any_work(tmp_path, full_disk):
    with pytest.raises(OutputError, match=r"cannot write to .*/out: No space left"):
        writable_folder(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_file_is_one_message(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model": ')
    with pytest.raises(OutputError, match=r"config\.json is damaged \(.*new folder"):
        read_json(path)
    with pytest.raises(OutputError, match=r"config\.json is damaged"):
        load(tmp_path)
    path.write_text('{"fusion": {"name": "none"}}')
    with pytest.raises(ConfigError, match=r"config\.model is missing"):
        load(tmp_path)
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 1}\n\0\0\n{"step": 2')
    with pytest.raises(OutputError, match=r"metrics\.jsonl is damaged"):
        read_lines(lines)
    lines.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(lines) == [{"step": 1}]
