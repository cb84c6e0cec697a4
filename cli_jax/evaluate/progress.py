"""The progress bar of everything that walks through questions or pictures."""

from __future__ import annotations

import sys

import jax
from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str = "question") -> tqdm:
    """A bar with the time left, on the first process only; rare lines where nobody watches."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        dynamic_ncols=True,
        disable=jax.process_index() > 0,
    )
