"""A training process that something happens to, for the tests of resuming: see `main`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path

import train_tiny

from cli_jax.train import loop
from cli_jax.train.state import flatten
from cli_jax.train.step import lower_step


class Eventful(train_tiny.Data):
    """Sends this process a signal when it is asked for a given batch and no save is going on.

    Or it never returns from batch `stall`.
    """

    def __init__(self, experiment, folder: Path, events: dict[int, int], stall: int | None) -> None:
        super().__init__(experiment)
        self.folder, self.events, self.stall = folder, events, stall

    def __next__(self):
        batch = super().__next__()
        while self.position == self.stall:
            time.sleep(1)
        if self.position in self.events:
            while unfinished(self.folder):
                time.sleep(0.001)
            os.kill(os.getpid(), self.events[self.position])
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
    args = parser.parse_args()
    experiment, folder = train_tiny.experiment(**args.changes), Path(args.workdir)
    events = {args.kill_at_batch: signal.SIGKILL, args.terminate_at_batch: signal.SIGTERM}
    if args.kill_in_save:
        target, name = kill_during_save, f"{args.kill_in_save}."
        threading.Thread(target=target, args=(folder, name), daemon=True).start()
    loop.compile_step = lambda setup: lower_step(setup).compile(train_tiny.QUICK)
    data = Eventful(experiment, folder, events, args.stall_at_batch)
    result = loop.train(experiment, args.workdir, data)
    for path, leaf in flatten(result.state.params).items():
        print(path, tuple(leaf.sharding.spec), len(leaf.addressable_shards))
    print("complete" if result.complete else "interrupted", int(result.state.step))


if __name__ == "__main__":
    main()
