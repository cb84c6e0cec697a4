"""Starts training processes for the tests; all of a cache folder compile each program once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cli_jax.parallel import processes

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("train_child.py")


LIMIT = 480  # seconds for a whole run; the others wait for a process that has died


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


def environments(count: int, cache: Path, devices: int) -> list[dict[str, str]]:
    """Those of the `count` processes of one run; of a single one that joins nobody."""
    if count == 1:
        return [environment(cache, devices)]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [
        environment(cache, devices)
        | {
            processes.ADDRESS: f"localhost:{port}",
            processes.COUNT: str(count),
            processes.INDEX: str(index),
        }
        for index in range(count)
    ]


def run_processes(
    count: int, cache: Path, workdir: Path, *arguments: str, devices: int = 1
) -> list[subprocess.CompletedProcess[str]]:
    """`count` processes of one training, each with so many devices, to their end."""
    return run_together(child_command(workdir, *arguments), count, cache, devices)


def run_together(
    command: list[str], count: int, cache: Path, devices: int
) -> list[subprocess.CompletedProcess[str]]:
    """A command as `count` processes that join each other, to their end."""
    children = [
        subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for variables in environments(count, cache, devices)
    ]
    try:
        # All at once: one whose pipe is full would wait, and the others for it.
        with ThreadPoolExecutor(count) as readers:
            outputs = list(readers.map(lambda child: child.communicate(timeout=LIMIT), children))
    finally:
        for child in children:
            child.kill()
    return [
        subprocess.CompletedProcess(child.args, child.returncode, *output)
        for child, output in zip(children, outputs, strict=True)
    ]
