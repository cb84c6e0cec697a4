"""Bins of a small data set, and global batches read by any number of processes."""

import dataclasses

import numpy as np
import small

from cli_jax.data.offline import make_bins
from cli_jax.data.pipeline import make_loader

TOKENIZER = small.tokenizer()
GLOBAL = 4  # rows of a global batch


def bin_up(data, out, seed=0):
    """The config with bins, and the notes of making them."""
    notes = make_bins(data, small.IMAGE, small.VISION, TOKENIZER, out, seed=seed, progress=False)
    return dataclasses.replace(data, bins=str(out)), notes


def loaders(data, processes=1, seed=0, image=small.IMAGE, **more):
    return [
        make_loader(
            data, image, small.VISION, seed=seed, rows_per_process=GLOBAL // processes,
            process_index=p, process_count=processes, tokenizer=TOKENIZER, **more,
        )
        for p in range(processes)
    ]  # fmt: skip


def take(parts, n):
    """The next n global batches: the processes' rows, in the order of the processes."""
    batches = [[next(part) for part in parts] for _ in range(n)]
    return [
        {name: np.concatenate([rows[name] for rows in batch]) for name in batch[0]}
        for batch in batches
    ]


def close(parts):
    for part in parts:
        part.close()
