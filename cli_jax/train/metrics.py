"""Where the numbers of a run go: a progress bar, `metrics.jsonl` and a TensorBoard event file."""

from __future__ import annotations

import contextlib
import json
import sys
import time

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from cli_jax.output import write_lines
from cli_jax.train.workdir import WorkdirError, read_lines

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes the metrics of finished updates; on every process but the first it does nothing.

    A line is written every `every` updates and at the last one: the metrics of that update, and
    the tokens and pictures per second since the line before.
    """

    def __init__(self, folder: epath.Path, start: int, total: int, every: int) -> None:
        self._total, self._every = total, every
        self._active = jax.process_index() == 0
        self._tokens = self._images = 0.0
        self._since = time.perf_counter()
        if not self._active:
            return
        forget_after(folder, start)
        self._path = folder / FILE
        self._file = self._path.open("a")
        self._board = Board(folder, start)
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            desc="train",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def done(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of an update that has finished, with `tokens` and `images` in them.

        Raises `WorkdirError` when they cannot be written.
        """
        if not self._active:
            return
        self._tokens += values["tokens"]
        self._images += values["images"]
        if step % self._every == 0 or step == self._total:
            values = values | self._speeds()
            self._show(values)
            try:
                self._write(step, values)
            except OSError as error:
                raise WorkdirError(
                    f"cannot write {self._path}: {error.strerror or error}. Free some space, then "
                    f"run the same command again: it goes on from the last checkpoint"
                ) from error
        self._bar.update(1)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            with contextlib.suppress(OSError):  # was reported when a line could not be written
                self._file.close()
            with contextlib.suppress(OSError):
                self._board.close()

    def _speeds(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        tokens, images, self._tokens, self._images = self._tokens, self._images, 0.0, 0.0
        return {"tokens_per_second": tokens / seconds, "images_per_second": images / seconds}

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._board.write(step, values)

    def _show(self, values: dict[str, float]) -> None:
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, "
            f"{values['images_per_second']:,.1f} images/s"
        )


class Board:
    """A TensorBoard event file, written in place.

    Not tensorboardX's `SummaryWriter`: its writing thread dies on a full disk, and the training
    that feeds it then waits for ever.
    """

    def __init__(self, folder: epath.Path, start: int) -> None:
        self._writer = EventsWriter(str(folder / "events"), f".{start}")
        # What an earlier process wrote of later steps is to be hidden: they are done again.
        again = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=start + 1, wall_time=time.time(), session_log=again))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            summary = scalar(f"train/{name}", value)
            self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def forget_after(folder: epath.Path, step: int) -> None:
    """Drops the lines after `step`: a run that goes on from there writes them again."""
    path = folder / FILE
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    write_lines(path, kept)
