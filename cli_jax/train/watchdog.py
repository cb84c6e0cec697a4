"""A run that stands still is ended, with the stacks of all threads.

A dead host or a stuck file system would leave it waiting for ever, and a pod costs as much then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

_STDERR = 2  # the descriptor: `sys.stderr` may be replaced by something that cannot be written to
_GRACE = 10.0  # seconds that the thread has for its message before the C level goes without one


class Watchdog:
    """Ends this process with exit code 1 when no update has finished for `seconds`; 0 = never.

    It watches from `__enter__` on, so setting up, restoring and compiling are not watched, and
    neither is what runs in `paused()`. A thread writes the message and the stacks. Should the main
    thread keep the interpreter lock, `faulthandler` writes the stacks a little later, without it.
    """

    def __init__(self, seconds: float, step: int) -> None:
        self._seconds, self._step = seconds, step
        self._since: float | None = None  # None: paused
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            self._restart()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
        self._stop()

    def done(self, step: int, values: object = None) -> None:
        """Takes note that an update has finished."""
        self._step = step
        if self._seconds > 0:
            self._restart()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work that may take long and ends by itself: saving has time limits of its own."""
        self._stop()
        yield
        if self._seconds > 0:
            self._restart()

    def _restart(self) -> None:
        with self._changed:
            self._since = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True, file=_STDERR)

    def _stop(self) -> None:
        with self._changed:
            self._since = None
            if self._seconds > 0:
                faulthandler.cancel_dump_traceback_later()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                idle = 0.0 if self._since is None else time.monotonic() - self._since
                if idle >= self._seconds:
                    self._end(idle)
                self._changed.wait(self._seconds - idle)

    def _end(self, idle: float) -> None:
        message = (
            f"\nerror: no update has finished for {idle:.0f} s, since update {self._step} "
            f"(config.log.stall_seconds={self._seconds:g}); the stacks of all threads follow. Run "
            f"the same command again: it goes on from the last checkpoint. If an update may take "
            f"that long, raise config.log.stall_seconds\n"
        )
        os.write(_STDERR, message.encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        os._exit(1)  # not sys.exit: the main thread is stuck
