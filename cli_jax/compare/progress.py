"""The progress bar of a whole comparison: updates of all runs, with the time left."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts the updates of all stages; answering is not counted, but its time is in the rate."""

    def __init__(self, total: int, finished: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=finished,
            desc="compare",
            unit="update",
            smoothing=0,  # arms differ in speed: the mean over all of them tells the time left
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )
        self._step: int | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def begin(self, what: str) -> None:
        """The next run or stage."""
        self._step = None
        self._bar.set_postfix_str(what)

    def done(self, step: int, values: object = None) -> None:
        """Takes note that update `step` of the current stage has finished."""
        if self._step is None:  # where the stage went on from was not done in this process
            self._bar.initial += step - 1
            self._bar.n += step - 1
            self._step = step - 1
        self._bar.update(step - self._step)
        self._step = step

    def reached(self, updates: int) -> None:
        """Takes note of the finished updates of all processes: the time left is that of all."""
        self._bar.update(max(0, updates - int(self._bar.n)))

    def fail(self, unfinished: int) -> None:
        """Takes note that the current run has failed: of the updates of its unfinished stages only
        those of the current one that were done before will ever be done."""
        self._bar.total -= unfinished - (self._step or 0)
        self._bar.refresh()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stdout)
        sys.stdout.flush()
