"""`config.data.prepare`: a data set that is made on the spot, in a run's own folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cli_jax.demo import digits
from cli_jax.experiment import ConfigError, DataConfig

MAKERS: dict[str, Callable[[str | Path], None]] = {"digits": digits.make}

_MADE = "made.json"  # written into a finished folder


def prepare(data: DataConfig) -> bool:
    """Makes the data set `data.prepare` in the folder `data.root`; True if that was necessary.

    The folder appears complete or not at all, so a run that is killed while making it, or several
    processes that make it at once, do no harm. Nothing happens if `data.prepare` is empty. Raises
    ConfigError for an unknown name, a folder that something else has made or one that cannot be
    written.
    """
    if not data.prepare:
        return False
    if data.prepare not in MAKERS:
        raise ConfigError(
            f"config.data.prepare is {data.prepare!r}: known are {sorted(MAKERS)}, or empty"
        )
    folder = Path(data.root)
    if _is_made(folder, data.prepare):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            MAKERS[data.prepare](unfinished)
            (unfinished / _MADE).write_text(json.dumps({"maker": data.prepare}))
            unfinished.chmod(0o755)
            os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if _is_made(folder, data.prepare):  # another process was faster
            return False
        raise ConfigError(
            f"the data set {data.prepare!r} cannot be made in config.data.root = {folder}: "
            f"{error.strerror or error}; choose another folder or free it"
        ) from error
    return True


def _is_made(folder: Path, maker: str) -> bool:
    made = folder / _MADE
    if made.is_file() and json.loads(made.read_text())["maker"] == maker:
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"config.data.root = {folder} exists and does not hold the data set {maker!r}; "
            "remove it or choose another folder"
        )
    return False
