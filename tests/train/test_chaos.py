"""Killed again and again at random moments, a run ends in the bits of one that was left alone."""

import json
import math
import random
import re
import subprocess
import time

import jax
import pytest
from train_damage import arrays, flip_a_bit
from train_processes import child_command, environment, run_child

from cli_jax.train.checkpoint import FOLDER, load_params

SLOW = 0.1  # seconds per batch, so that lives of so many seconds cannot finish the run
EVERY = 2  # updates between checkpoints; saving takes longer, so a save is nearly always going on


def moments(kills):
    """(what to wait for, seconds from then on) of each kill: starting up, or doing updates."""
    rng = random.Random(0)
    early, late = ("", 8.0), ("compiled the update", 2.5)
    chosen = [early if i % 5 == 2 else late for i in range(kills)]
    return [(sign, rng.uniform(0, longest)) for sign, longest in chosen]


def kill_at(sign, seconds, cache, workdir, *arguments):
    """Starts the run and kills it so many seconds after `sign` was printed; returns its output."""
    with (workdir.parent / "output").open("w+") as output:
        command = child_command(workdir, *arguments)
        child = subprocess.Popen(command, env=environment(cache), stdout=output, stderr=output)

        def printed():
            output.seek(0)
            return output.read()

        limit = time.monotonic() + 240
        while sign not in printed() and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(seconds)
        assert child.poll() is None, printed()
        child.kill()
        child.wait()
        return printed()


def saves(workdir):
    """(the steps of the complete checkpoints, those that were being written)."""
    names = [path.name for path in (workdir / FOLDER).glob("*")]
    return sorted(int(n) for n in names if n.isdigit()), [n for n in names if n.endswith("-tmp")]


def resumed(output):
    found = re.search(r"resuming after step (\d+)", output)
    return int(found[1]) if found else None


def chaos(kills, tmp_path, capsys):
    plan = moments(kills)
    total = 10 + math.ceil(sum(seconds for sign, seconds in plan if sign) / SLOW)
    cache, workdir, alone = tmp_path / "cache", tmp_path / "run" / "w", tmp_path / "alone"
    workdir.parent.mkdir()

    def changes(every):
        return "--changes", json.dumps({"total_steps": total, "checkpoint": {"every": every}})

    begun = time.monotonic()
    done = run_child(cache, alone, *changes(10_000))
    assert done.returncode == 0, done.stderr
    in_save, starts = 0, []
    for sign, seconds in plan:
        complete, _ = saves(workdir)
        output = kill_at(sign, seconds, cache, workdir, *changes(EVERY), "--slow", str(SLOW))
        assert "damaged" not in output
        if sign:  # a half-written checkpoint is never picked, and a complete one is never lost
            assert resumed(output) == max(complete, default=None), output
            starts.append(resumed(output) or 0)
        in_save += bool(saves(workdir)[1])

    # A damaged one is reported, and the one before it used.
    before, newest = saves(workdir)[0][-2:]
    flip_a_bit(workdir / FOLDER / str(newest))
    done = run_child(cache, workdir, *changes(EVERY))
    assert done.returncode == 0, done.stderr
    assert f"{FOLDER}/{newest} is damaged" in done.stderr
    assert resumed(done.stdout) == before

    assert arrays(workdir / FOLDER / str(total)) == arrays(alone / FOLDER / str(total))
    pair = (load_params(workdir), load_params(alone))
    for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
        assert x.tobytes() == y.tobytes()
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, total + 1))
    spent = json.loads((workdir / "goodput.json").read_text())
    assert spent["steps_done_again"] > 0
    assert spent["seconds"]["restart"] > 0
    with capsys.disabled():
        print(
            f"\n{kills} kills, {in_save} of them in a save, of a run of {total} updates in "
            f"{time.monotonic() - begun:.0f} s; started from {starts}, then {before}; "
            f"{spent['steps_done_again']} updates done again, goodput {spent['goodput']:.1%}"
        )
    return in_save


def test_three_kills(tmp_path, capsys):
    chaos(3, tmp_path, capsys)


@pytest.mark.slow
def test_twenty_five_kills(tmp_path, capsys):
    assert chaos(25, tmp_path, capsys) >= 5
