"""A training process that something happens to, for the tests of resuming: see `main`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import train_tiny

from cli_jax.parallel import processes
from cli_jax.train import loop
from cli_jax.train.state import flatten
from cli_jax.train.step import lower_step


class Eventful(train_tiny.Data):
    """Something happens when it is asked for given batches, and every batch takes a while.

    `signals`: this process gets a signal, when no save is going on; `stall`: nothing comes back.
    """

    def __init__(self, experiment, folder: Path, signals, stall: int | None, slow: float) -> None:
        super().__init__(experiment)
        self.folder, self.signals, self.stall, self.slow = folder, signals, stall, slow

    def __next__(self):
        batch = super().__next__()
        time.sleep(self.slow)
        while self.position == self.stall:
            time.sleep(1)
        if self.position in self.signals:
            while unfinished(self.folder):
                time.sleep(0.001)
            os.kill(os.getpid(), self.signals[self.position])
        return batch


def unfinished(folder: Path) -> list[str]:
    """The saves that are being written to disk."""
    return [path.name for path in folder.glob("checkpoints/*-tmp")]


def kill_during_save(folder: Path, name: str) -> None:
    """Kills this process as soon as a save has begun to write to disk."""
    while not any(save.startswith(name) for save in unfinished(folder)):
        time.sleep(0.0002)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--changes", type=json.loads, default={})
    parser.add_argument("--kill_at_batch", type=int)
    parser.add_argument("--terminate_at_batch", type=int)
    parser.add_argument("--kill_in_save", type=int)
    parser.add_argument("--stall_at_batch", type=int)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds per batch")
    parser.add_argument("--process", type=int, default=0, help="the one that gets the signal")
    args = parser.parse_args()
    if processes.COUNT in os.environ:
        processes.join()
    experiment, folder = train_tiny.experiment(**args.changes), Path(args.workdir)
    signals = {args.kill_at_batch: signal.SIGKILL, args.terminate_at_batch: signal.SIGTERM}
    if jax.process_index() != args.process:
        signals.clear()
    if args.kill_in_save:
        target, name = kill_during_save, f"{args.kill_in_save}."
        threading.Thread(target=target, args=(folder, name), daemon=True).start()
    loop.compile_step = lambda setup: lower_step(setup).compile(train_tiny.QUICK)
    data = Eventful(experiment, folder, signals, args.stall_at_batch, args.slow)
    result = loop.train(experiment, args.workdir, data)
    for path, leaf in flatten(result.state.params).items():
        print(path, tuple(leaf.sharding.spec), len(leaf.addressable_shards))
    print("complete" if result.complete else "interrupted", int(result.state.step))


if __name__ == "__main__":
    main()
