"""The folder of a run: it must be writable, and it says what made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from cli_jax import __version__
from cli_jax.experiment import Experiment, to_dict


class WorkdirError(RuntimeError):
    """A workdir that cannot be used; the message names it and the reason."""


def prepare(workdir: str | os.PathLike) -> epath.Path:
    """Creates the folder and proves that it can be written to; raises `WorkdirError` if not."""
    folder = epath.Path(workdir)
    probe = folder / f".writable_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"--workdir {folder} cannot be written to ({error.strerror or error}): "
            f"choose another folder or free it"
        ) from error
    return folder


def describe(folder: epath.Path, experiment: Experiment, revision: str) -> None:
    """Writes `config.json`, the resolved config, and `run.json`, the code and the machine."""
    if jax.process_index():
        return
    run = {
        "revision": revision,
        "cli_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / "config.json").write_text(json.dumps(to_dict(experiment), indent=2) + "\n")
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The JSON lines of a file, none if it is missing; one that a kill cut off is left out."""
    path = epath.Path(path)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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
