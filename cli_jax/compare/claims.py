"""Several processes share a comparison: each takes runs that no other one is at.

A claim is a lock on a file, so it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cli_jax.compare.runs import Run
from cli_jax.train.workdir import LOCK


@contextlib.contextmanager
def claim(run: Run, root: Path) -> Iterator[bool]:
    """Takes a run for this process; gives False while another one has it."""
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout:
            yield False
        else:
            yield True


def claimed(runs: Sequence[Run], root: Path) -> Generator[Run]:
    """Every run, claimed until the next one is asked for, except those that others are still at
    when all the rest has been given. To be closed, which gives the last claim back."""
    left = list(runs)
    while left:
        passed = []
        for run in left:
            with claim(run, root) as free:
                if free:
                    yield run
                else:
                    passed.append(run)
        if len(passed) == len(left):
            return
        left = passed


def in_turn(root: Path) -> FileLock:
    """For `with`: one process after the other; waits for its turn."""
    return FileLock(root / LOCK)
