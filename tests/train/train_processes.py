"""Starts training processes for the tests; all of a cache folder compile each program once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("train_child.py")


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    """CPU devices, and a compilation cache that takes every program."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def child_command(workdir: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(CHILD), str(workdir), *arguments]


def run_child(
    cache: Path, workdir: Path, *arguments: str, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    """One `train_child.py`, to its end."""
    return subprocess.run(
        child_command(workdir, *arguments),
        env=environment(cache, devices),
        capture_output=True,
        text=True,
    )
