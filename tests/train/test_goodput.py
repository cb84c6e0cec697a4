"""Every second of a run is counted once, as what it was spent on."""

import json
import time

import pytest
import train_tiny

from cli_jax.train.goodput import KINDS, Goodput, summarize, table
from cli_jax.train.workdir import WorkdirError, prepare, read_lines


class Slow(train_tiny.Data):
    def __next__(self):
        time.sleep(0.1)
        return super().__next__()


def test_the_kinds_sum_to_the_wall_time(go, setup, tmp_path, capsys):
    begun = time.perf_counter()
    go(tmp_path, data=Slow(setup.experiment))
    wall = time.perf_counter() - begun
    summary = json.loads((tmp_path / "goodput.json").read_text())
    spent = summary["seconds"]
    assert spent.keys() == KINDS.keys()
    assert sum(spent.values()) == pytest.approx(summary["wall_seconds"])
    assert summary["wall_seconds"] <= wall
    assert spent["step"] + spent["data"] >= 0.7  # seven updates; how much more is the machine's
    assert spent["data"] > 0.1  # the first one waits in any case
    assert spent["restart"] == 0
    assert min(spent[kind] for kind in ("init", "step", "save")) > 0
    assert summary["goodput"] == pytest.approx(spent["step"] / summary["wall_seconds"])
    assert (summary["steps"], summary["starts"], summary["steps_done_again"]) == (7, 1, 0)
    out = capsys.readouterr().out
    assert "(1 starts, 0 updates done again)" in out
    assert all(f"\n  {kind} " in out for kind in KINDS)
    again = (tmp_path / "goodput.jsonl").read_text()
    go(tmp_path)  # there is nothing left to do, so it is not a restart
    assert (tmp_path / "goodput.jsonl").read_text() == again


class Running:
    """An update's result that is there after some seconds."""

    def __init__(self, seconds):
        self._seconds = seconds

    def block_until_ready(self):
        time.sleep(self._seconds)
        return self


def test_data_made_while_an_update_runs_are_not_waited_for(tmp_path):
    goodput = Goodput(prepare(tmp_path), every=1)
    goodput.begin(0)
    for update, seconds in ((None, 0.1), (Running(0.2), 0.5), (Running(30), 0.2)):
        with goodput.fetching(update):
            time.sleep(seconds)
    goodput.record(1)
    spent = read_lines(tmp_path / "goodput.jsonl")[-1]["seconds"]
    assert spent["step"] >= 0.2 + 0.2
    assert 0.1 <= spent["data"] <= sum(spent.values()) - 0.4


def line(run, done, begun, **seconds):
    ended = begun + sum(seconds.values())
    return {"run": run, "step": done, "begun": begun, "ended": ended, "seconds": seconds}


def test_what_a_restart_costs():
    """Killed after update 5 with a checkpoint of 3, then before any checkpoint, then finished."""
    lines = [
        line(0, 0, 1000, init=10, compile=20),
        line(0, 3, 1030, step=30, data=3, save=1),
        line(0, 5, 1064, step=20, data=2, save=4),
        line(1, 3, 1100, init=8, compile=5),
        line(1, 4, 1113, step=10),
        line(2, 3, 1200, init=7, compile=6),
        line(2, 7, 1213, step=40, data=4, save=2),
    ]
    summary = summarize(lines)
    gaps = (1100 - 1090) + (1200 - 1123)
    assert summary["seconds"] == {
        "init": 25,
        "compile": 31,
        "step": 70,
        "data": 7,
        "save": 3,
        "measure": 0,
        "restart": gaps + (20 + 2 + 4) + 10,
    }
    assert summary["wall_seconds"] == 1259 - 1000 == sum(summary["seconds"].values())
    assert summary["starts"] == 3
    assert summary["steps_done_again"] == 2 + 1
    assert "goodput 27.0% (3 starts, 3 updates done again)" in table(summary)


def test_a_later_start_from_an_earlier_checkpoint_loses_more():
    lines = [
        line(0, 0, 0, init=1),
        line(0, 6, 1, step=6),
        line(1, 6, 7, init=1),
        line(1, 8, 8, step=2),
        line(2, 4, 10, init=1),  # the checkpoint of step 6 turned out to be damaged
        line(2, 9, 11, step=5),
    ]
    summary = summarize(lines)
    assert summary["seconds"]["restart"] == 6 + 2
    assert summary["seconds"]["step"] == 5


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    folder = prepare(tmp_path)
    first = Goodput(folder, every=2)
    first.begin(0)
    for step in range(1, 6):
        first.done(step)
    assert [kept["step"] for kept in read_lines(folder / "goodput.jsonl")] == [0, 2, 4]
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write('{"run": 0, "st')
    second = Goodput(folder, every=2)
    second.begin(3)
    assert "2 starts, 1 updates done again" in second.finish(7)
    kept = [(kept["run"], kept["step"]) for kept in read_lines(folder / "goodput.jsonl")]
    assert kept == [(0, 0), (0, 2), (0, 4), (1, 3), (1, 7)]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    goodput = Goodput(prepare(tmp_path), every=1)
    (tmp_path / "goodput.jsonl").mkdir()
    with pytest.raises(
        WorkdirError, match=r"cannot write .*goodput\.jsonl: .*the same command again"
    ):
        goodput.record(0)
