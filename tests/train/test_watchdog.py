"""A run that stands still ends by itself; one that is only slow at other things does not."""

import json
import subprocess
import sys

import pytest
from train_processes import run_child

STALLS = {
    "waiting": "time.sleep(60)",
    "holding the interpreter": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("stall", STALLS)
def test_a_stall_ends_the_process_with_its_stacks(stall):
    code = f"""
import ctypes, time
from cli_jax.train import watchdog
watchdog._GRACE = 0.5
def stuck():
    {STALLS[stall]}
with watchdog.Watchdog(1, 16):
    stuck()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "in stuck" in done.stderr
    if stall == "waiting":
        assert "error: no update has finished for 1 s, since update 16" in done.stderr
        assert "config.log.stall_seconds=1)" in done.stderr
        assert "Run the same command again" in done.stderr


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_progress_pauses_and_the_end_keep_it_quiet(seconds):
    code = f"""
import time
from cli_jax.train.watchdog import Watchdog
with Watchdog({seconds}, 0) as watchdog:
    for step in range(8):
        time.sleep(0.15)
        watchdog.done(step)
    with watchdog.paused():
        time.sleep(1.2)
    time.sleep(0.2)
time.sleep(1)
if not {seconds}:
    with Watchdog(0, 0):
        time.sleep(1)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_stalled_data_ends_a_run_which_then_goes_on(tmp_path):
    """Compiling takes longer than the limit, without a cache, and is not taken for a stall."""
    cache, workdir = tmp_path / "cache", tmp_path / "run"
    limit = ("--changes", json.dumps({"log": {"stall_seconds": 2}}))
    done = run_child(cache, workdir, *limit, "--stall_at_batch", "6")
    assert done.returncode == 1
    assert "error: no update has finished for 2 s, since update 4" in done.stderr
    assert "in __next__" in done.stderr

    done = run_child(cache, workdir, *limit)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stdout
    assert done.stdout.splitlines()[-1] == "complete 7"

    assert "(2 starts, 1 updates done again)" in done.stdout
    spent = json.loads((workdir / "goodput.json").read_text())["seconds"]
    assert spent["restart"] > 2  # the stall, among others
    assert all(spent[kind] > 0 for kind in ("init", "compile", "step", "data", "save"))
