"""Where the time of a run went, over all its processes' lives: `goodput.jsonl` and `goodput.json`.

At any moment exactly one kind of time is running, so the kinds sum to the wall time. A line is
appended every few updates and after each save; what a killed process did after its last line, and
the time until the next one started, is counted as `restart`, and so are updates that had to be
done again.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from cli_jax.output import write_json, write_lines
from cli_jax.train.workdir import WorkdirError, read_lines

LINES, SUMMARY = "goodput.jsonl", "goodput.json"

KINDS = {
    "init": "setting up, restoring, loading weights",
    "compile": "compiling the update",
    "step": "updates",
    "data": "waiting for data, nothing to compute",
    "save": "waiting for checkpoints",
    "measure": "measuring on held-out data",
    "restart": "lost: done again, or no process",
}
_LOST = ("step", "data", "save", "measure")  # what is done again after a restart


class Goodput:
    """Records one process's life in a run; only the first process writes.

    It starts in `init`; from `begin` on, time that no `spent` block claims is `step`.
    """

    def __init__(self, folder: epath.Path, every: int) -> None:
        self._folder, self._every = folder, every
        self._kind, self._rest = "init", "init"
        self._begun, self._since = time.time(), time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._run = 0
        self._active = jax.process_index() == 0

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the block as time of a kind."""
        self._switch(kind)
        try:
            yield
        finally:
            self._switch(self._rest)

    @contextlib.contextmanager
    def fetching(self, running: Any) -> Iterator[None]:
        """Counts the block as waiting for data, but not while the update before it still runs.

        running: what that update returns, or None. A thread waits for it, since a batch may be made
        in the very time that the device computes; its errors are the loop's to see.
        """
        ended: list[float] = []

        def wait() -> None:
            with contextlib.suppress(Exception):
                jax.block_until_ready(running)
            ended.append(time.perf_counter())

        self._switch("data")
        begun = self._since
        threading.Thread(target=wait, daemon=True).start()
        try:
            yield
        finally:
            self._switch(self._rest)
            busy = min([*ended, self._since]) - begun
            self._seconds["data"] -= busy
            self._seconds["step"] = self._seconds.get("step", 0.0) + busy

    def begin(self, step: int) -> None:
        """The updates after `step` follow; reads what earlier processes have left."""
        self._rest = "step"
        self._switch("step")
        if self._active and (lines := read_lines(self._folder / LINES)):
            self._run = lines[-1]["run"] + 1
            # Not appended to as it is: a kill may have cut off its last line.
            write_lines(self._folder / LINES, lines)
        self.record(step)

    def done(self, step: int, values: object = None) -> None:
        """Takes note that an update has finished."""
        if step % self._every == 0:
            self.record(step)

    def record(self, step: int) -> None:
        """Appends the time since the last line; `step` updates are done by now."""
        self._switch(self._kind)
        seconds, self._seconds = self._seconds, {}
        ended = self._begun + sum(seconds.values())
        line = {"run": self._run, "step": step, "begun": self._begun, "ended": ended}
        self._begun = ended
        if self._active:
            text = json.dumps(line | {"seconds": seconds}) + "\n"
            try:
                with (self._folder / LINES).open("a") as file:
                    file.write(text)
            except OSError as error:
                raise WorkdirError(
                    f"cannot write {self._folder / LINES}: {error.strerror or error}. Free some "
                    f"space, then run the same command again: it goes on from the last checkpoint"
                ) from error

    def finish(self, step: int) -> str:
        """Writes `goodput.json` and returns it as a table, on the first process."""
        self.record(step)
        if not self._active:
            return ""
        summary = summarize(read_lines(self._folder / LINES))
        write_json(self._folder / SUMMARY, summary)
        return table(summary)

    def _switch(self, kind: str) -> None:
        now = time.perf_counter()
        self._seconds[self._kind] = self._seconds.get(self._kind, 0.0) + now - self._since
        self._kind, self._since = kind, now


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and share by kind, wall seconds, goodput, starts, steps and steps done again.

    A process that started at step s makes all that earlier ones did after s lost.
    """
    seconds = dict.fromkeys(KINDS, 0.0)
    again, start = 0, lines[-1]["step"]  # `start`: the earliest that a later process started from
    later: dict[str, Any] | None = None
    for i in reversed(range(len(lines))):
        line = lines[i]
        if later and line["run"] != later["run"]:  # the last line before a restart
            seconds["restart"] += max(0.0, later["begun"] - line["ended"])
            again += max(0, line["step"] - later["step"])
            start = min(start, later["step"])
        for kind, value in line["seconds"].items():
            lost = line["step"] > start and kind in _LOST
            seconds["restart" if lost else kind] += value
        later = line
    wall = sum(seconds.values())
    return {
        "seconds": seconds,
        "share": {kind: value / wall for kind, value in seconds.items()},
        "wall_seconds": wall,
        "goodput": seconds["step"] / wall,
        "starts": lines[-1]["run"] + 1,
        "steps": lines[-1]["step"],
        "steps_done_again": again,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    rows = [
        f"  {kind:<8} {summary['seconds'][kind]:>12,.1f} s  {summary['share'][kind]:>6.1%}  {what}"
        for kind, what in KINDS.items()
    ]
    return "\n".join(
        [
            f"time since the first start: {summary['wall_seconds']:,.1f} s, goodput "
            f"{summary['goodput']:.1%} ({summary['starts']} starts, "
            f"{summary['steps_done_again']} updates done again)",
            *rows,
        ]
    )
