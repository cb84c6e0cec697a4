"""Being asked to stop: SIGTERM or Ctrl-C on one process, a preemption notice on many."""

from __future__ import annotations

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Remembers that somebody wants the run to stop, so that the loop can save first.

    Several processes have to stop after the same step. There, jax's coordination service catches
    SIGTERM on any of them and `requested` turns true on all of them at a step it has agreed on. A
    second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, step: int) -> bool:
        """Whether to stop before doing update `step`; every process has to ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
