"""Data sets made on the spot: once, completely, and never over something else."""

import os

import pytest

from cli_jax.demo import MAKERS, prepare
from cli_jax.experiment import ConfigError, DataConfig


@pytest.fixture
def calls(monkeypatch):
    """A maker `toy` that writes one file, and the folders it was called with."""
    made = []

    def maker(folder):
        made.append(folder)
        (folder / "train.json").write_text("[]")

    monkeypatch.setitem(MAKERS, "toy", maker)
    return made


def data(root, name="toy"):
    return DataConfig(root=str(root), prepare=name)


def test_made_once(tmp_path, calls):
    root = tmp_path / "run" / "data"
    assert prepare(data(root)) is True
    assert prepare(data(root)) is False
    assert (root / "train.json").read_text() == "[]"
    assert len(calls) == 1
    assert os.listdir(tmp_path / "run") == ["data"]


def test_nothing_happens_without_a_name(tmp_path, calls):
    assert prepare(data(tmp_path / "data", "")) is False
    assert not calls
    assert not (tmp_path / "data").exists()


def test_an_empty_folder_is_filled(tmp_path, calls):
    (tmp_path / "data").mkdir()
    assert prepare(data(tmp_path / "data")) is True
    assert (tmp_path / "data" / "train.json").exists()


def test_a_maker_that_dies_leaves_nothing(tmp_path, monkeypatch):
    def maker(folder):
        (folder / "train.json").write_text("[")
        raise KeyboardInterrupt

    monkeypatch.setitem(MAKERS, "toy", maker)
    with pytest.raises(KeyboardInterrupt):
        prepare(data(tmp_path / "data"))
    assert os.listdir(tmp_path) == []


def test_a_faster_process_wins(tmp_path, monkeypatch):
    """Two processes make the same folder: the slower one finds it done."""
    root = tmp_path / "data"

    def faster(folder):
        monkeypatch.setitem(MAKERS, "toy", lambda folder: None)
        assert prepare(data(root)) is True
        (folder / "late").write_text("")

    monkeypatch.setitem(MAKERS, "toy", faster)
    assert prepare(data(root)) is False
    assert "late" not in os.listdir(root)
    assert os.listdir(tmp_path) == ["data"]


def test_refusals(tmp_path, calls):
    with pytest.raises(
        ConfigError, match=r"config\.data\.prepare is 'didgits': known are .*digits"
    ):
        prepare(data(tmp_path / "data", "didgits"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="mine exists and does not hold the data set 'toy'"):
        prepare(data(mine))
    assert (mine / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made in"):
        prepare(data(tmp_path / "file" / "data"))
    assert not calls


def test_another_set_in_the_folder_is_refused(tmp_path, calls, monkeypatch):
    monkeypatch.setitem(MAKERS, "other", MAKERS["toy"])
    prepare(data(tmp_path / "data"))
    with pytest.raises(ConfigError, match="does not hold the data set 'other'"):
        prepare(data(tmp_path / "data", "other"))
