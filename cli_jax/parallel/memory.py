"""Host memory: keeps XLA:CPU from returning its buffers to the system after every step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to reuse freed blocks; returns whether it could (Linux with glibc only).

    XLA:CPU allocates a step's temporaries anew each step. glibc maps blocks of that size from the
    system and unmaps them again, so every step page-faults through all of its memory: a quarter of
    the step's time for the small configs. Call it before jax allocates; peak memory is unchanged.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)
