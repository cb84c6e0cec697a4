"""A trace of chosen updates, for TensorBoard's profile plugin or XProf."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from etils import epath

from cli_jax.experiment import ConfigError

FOLDER = "profile"


class Profile:
    """Traces the updates of `spec` on the first process, into `<workdir>/profile`.

    `spec` is `config.log.profile`: "10:13" traces updates 10, 11 and 12, "" none. The tail of the
    update before and the head of the one behind are in the trace, too: updates are queued.
    """

    def __init__(self, folder: epath.Path, spec: str, total: int) -> None:
        self._folder = folder / FOLDER
        self._steps = parse(spec, total)
        self._active = jax.process_index() == 0
        self._running = False

    @contextlib.contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around the dispatch of an update: gives it a name in the trace."""
        if self._active and step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("update", step_num=step):
            yield

    def done(self, step: int, values: object = None) -> None:
        """Writes the trace when the last of its updates has finished."""
        if self._running and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Ends a trace that is going on."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def parse(spec: str, total: int) -> range:
    """The updates that "first:stop" names; `ConfigError` unless they are among the run's."""
    if not spec:
        return range(0)
    first, colon, stop = spec.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
        raise ConfigError(
            f"config.log.profile={spec!r} is not of the form first:stop with 1 <= first < stop, "
            f"e.g. 10:13 for the updates 10, 11 and 12"
        )
    if int(stop) > total + 1:
        raise ConfigError(
            f"config.log.profile={spec!r} names updates behind the last one: "
            f"config.total_steps={total}"
        )
    return range(int(first), int(stop))
