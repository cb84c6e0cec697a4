"""The folder that results are written to: proven writable before any work is done."""

from __future__ import annotations

import uuid
from pathlib import Path

from etils import epath


class OutputError(ValueError):
    """A place that results cannot be written to; the message names it and the reason."""


def writable_folder(path: str | Path) -> epath.Path:
    """Creates the folder and writes a file in it for a moment; raises OutputError if it cannot."""
    folder = epath.Path(path)
    probe = folder / f".writable_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder
