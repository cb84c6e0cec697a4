"""Where the numbers of a run go: a progress bar, `metrics.jsonl` and TensorBoard event files."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import tensorboardX
from etils import epath
from tqdm import tqdm

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
        self._file = (folder / FILE).open("a")
        self._board = tensorboardX.SummaryWriter(str(folder), purge_step=start + 1)
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            desc="train",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def done(self, step: int, values: dict[str, float]) -> None:
        """Takes the metrics of an update that has finished, with `tokens` and `images` in them."""
        if not self._active:
            return
        self._tokens += values["tokens"]
        self._images += values["images"]
        if step % self._every == 0 or step == self._total:
            self._write(step, values)
        self._bar.update(1)

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            self._board.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        values = values | {
            "tokens_per_second": self._tokens / seconds,
            "images_per_second": self._images / seconds,
        }
        self._tokens = self._images = 0.0
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, "
            f"{values['images_per_second']:,.1f} images/s"
        )


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, oldest first; one that was cut off by a kill is left out."""
    path = folder / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def forget_after(folder: epath.Path, step: int) -> None:
    """Drops the lines after `step`: a run that goes on from there writes them again."""
    path = folder / FILE
    if not path.exists():
        return
    kept = [line for line in read(folder) if line["step"] <= step]
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
