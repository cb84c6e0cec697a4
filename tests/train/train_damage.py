"""Ways to damage a checkpoint on disk, and what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def array_files(folder: Path, item: str = "params") -> list[Path]:
    """The data files of an item, largest first."""
    files = [path for path in (folder / item).rglob("d/*") if path.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def flip_a_bit(folder: Path) -> None:
    path = array_files(folder)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = array_files(folder, "optimizer")[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def arrays(folder: Path) -> dict[str, Any]:
    """Shape, type and checksum of every array of a checkpoint."""
    return json.loads((folder / "metadata" / "metadata").read_text())["arrays"]
