"""The folder of a run: it must be writable, and it says what made it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from filelock import FileLock, Timeout

from cli_jax import __version__
from cli_jax.experiment import Experiment, to_dict
from cli_jax.output import damaged, read_json, writable_folder, write_json

LOCK = ".lock"


class WorkdirError(RuntimeError):
    """A workdir that cannot be used; the message names it and the reason."""


def prepare(workdir: str | os.PathLike) -> epath.Path:
    """Creates the folder and proves that it can be written to; else WorkdirError, OutputError."""
    if "://" in str(workdir):
        raise WorkdirError(
            f"--workdir {workdir} is not a folder: logs are appended to, which buckets do not "
            f"allow. Mount the bucket (e.g. Cloud Storage FUSE) and give the mounted folder"
        )
    return writable_folder(workdir)


@contextlib.contextmanager
def alone(folder: epath.PathLike) -> Iterator[None]:
    """Raises WorkdirError while another process (of another command) writes to the folder."""
    if jax.process_index():
        yield
        return
    lock = FileLock(str(epath.Path(folder) / LOCK), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise WorkdirError(
            f"{folder} is in use by another process: wait for it, stop it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def describe(folder: epath.Path, experiment: Experiment, revision: str) -> None:
    """Writes `config.json`, the resolved config, and `run.json`, the code and the machine."""
    if jax.process_index():
        return
    path = folder / "run.json"
    before = read_json(path) if path.exists() else {}
    earlier = [*before.get("earlier_revisions", []), before.get("revision", revision)]
    run = {
        "revision": revision,
        "earlier_revisions": [each for each in dict.fromkeys(earlier) if each != revision],
        "cli_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(folder / "config.json", to_dict(experiment))
    write_json(path, run)


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if it is missing; one that a kill cut off is left out."""
    path = epath.Path(path)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise damaged(path, error) from error


def git_revision() -> str:
    """The commit of the code that runs, with `-dirty` if it was edited; `unknown` outside git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
