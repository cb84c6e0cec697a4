"""What is compared is written down before anything is trained, and cannot change afterwards.

`protocol.json` holds the config, the splits with checksums and the fingerprints of the encoders and
of the model that all start from, under one hash. So arms, steps and seeds are not chosen after a
look at the results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cli_jax.compare.config import Comparison
from cli_jax.experiment import ConfigError
from cli_jax.output import read_json, write_json
from cli_jax.train.checkpoint import FOLDER as CHECKPOINTS
from cli_jax.train.checkpoint import find_step
from cli_jax.train.workdir import git_revision

FILE = "protocol.json"
_SHOWN = 4  # differences in an error message


def fix(comparison: Comparison, splits: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes the protocol, or compares it with the one that is there; returns it.

    Raises ConfigError that names what differs and the remedy.
    """
    start = comparison.base.init_from
    content = {
        "config": comparison.raw,
        "data_root": comparison.base.data.root,
        "splits": dict(splits),
        "encoders": {e.name: fingerprint(e.path or start) for e in comparison.settings.encoders},
        "init_from": fingerprint(start),
    }
    content = json.loads(json.dumps(content))
    protocol = {
        "hash": digest(content),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "revision": git_revision(),
        **content,
    }
    path = folder / FILE
    if not path.is_file():
        write_json(path, protocol)
        return protocol
    there = read(folder)
    if there["hash"] != protocol["hash"]:
        raise ConfigError(
            f"{path} was fixed for another comparison: {_differences(there, content)}. Restore "
            "the old values, or give a new --output folder"
        )
    return there


def read(folder: Path) -> dict[str, Any]:
    """The protocol of an output folder; raises ConfigError if there is none, or an edited one."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the --output folder of a comparison")
    found = read_json(path)
    content = {k: v for k, v in found.items() if k not in ("hash", "written", "revision")}
    if digest(content) != found.get("hash"):
        raise ConfigError(f"{path} was edited after it was fixed: give a new --output folder")
    return found


def digest(content: Any) -> str:
    """SHA-256 of JSON, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(source: str) -> str:
    """Which parameters a path stands for: a workdir's newest checkpoint, or a folder's files."""
    if not source:
        return "random"
    path = Path(source)
    if (path / CHECKPOINTS).is_dir():
        step = find_step(path)
        metadata = path / CHECKPOINTS / str(step) / "metadata" / "metadata"  # holds checksums
        return f"step {step}, {_sha256([metadata])}"
    if path.exists():
        return _sha256(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
    return f"hub id {source}"


def _sha256(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = (dict(_leaves({key: each.get(key) for key in now})) for each in (there, now))
    lines = [
        f"{name} was {before.get(name)!r:.80} and is {after.get(name)!r:.80}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    return "; ".join(lines[:_SHOWN]) + ("; ..." if len(lines) > _SHOWN else "")


def _leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{at}.{key}" if at else key)
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{at}[{i}]")
    else:
        yield at, tree
