"""Files of a run: folders proven writable before any work, files written whole or not at all.

No jax here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from typing import Any

import numpy as np
from etils import epath

_PROBE_BYTES = 64 * 1024  # a full disk takes an empty file, but not this


class OutputError(ValueError):
    """A file that cannot be written, or read back; the message names it, reason and remedy."""


def writable_folder(path: str | os.PathLike[str]) -> epath.Path:
    """Creates a folder and writes a small file in it for a moment; OutputError if it cannot."""
    folder = epath.Path(path)
    # Not the process id in its name: containers of a pod have equal ones.
    probe = folder / f".writable_{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is the one that says why
            probe.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}. Choose another folder, or free "
            f"some space"
        ) from error
    return folder


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes beside the target first: a kill or a full disk leaves what was there.

    Text as UTF-8. Raises OutputError.
    """
    target = epath.Path(path)
    partial = target.parent / f"{target.name}.partial"
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}. Free some space, then run the same "
            f"command again"
        ) from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file that this software has written; raises OutputError if it is damaged."""
    try:
        return json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], error: ValueError) -> OutputError:
    """The error to raise for a file that cannot be read back."""
    return OutputError(
        f"{path} is damaged ({error}): restore it from a copy, or begin in a new folder"
    )


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """An indented JSON file."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: str | os.PathLike[str], lines: Any) -> None:
    """A JSON object a line."""
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_arrays(path: str | os.PathLike[str], **arrays: Any) -> None:
    """An .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())
