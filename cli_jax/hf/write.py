"""Output folders: all or nothing, streamed, in shards with an index."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cli_jax.hf.error import ConversionError
from cli_jax.hf.tensor import Tensor, blocks, nbytes
from cli_jax.hf.tensorfile import write_file

WEIGHTS = "model.safetensors"
GB = 10**9


@contextlib.contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """A folder OUT.tmp to fill, which becomes OUT when everything in it is on disk.

    Nothing that exists is overwritten, and what fails leaves nothing behind.
    """
    out = Path(out).expanduser().absolute()
    unfinished = out.with_name(out.name + ".tmp")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists and is not empty: give another folder")
    if unfinished.exists():
        raise ConversionError(
            f"{unfinished} is left from a conversion that was interrupted, or still runs: remove it"
        )
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield unfinished
        unfinished.rename(out)
    except OSError as error:
        raise ConversionError(
            f"the conversion into {out} failed ({error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, max_shard_gb: float, progress: bool
) -> None:
    """Writes tensors by stored name as model.safetensors, or as shards with their index."""
    total = sum(nbytes(t) for t in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ConversionError(
            f"{folder.parent} has {free / GB:.1f} GB free, the output needs {total / GB:.1f} GB"
        )
    shards = _shards(tensors, int(max_shard_gb * GB))
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, shard in zip(files, shards, strict=True):
            bar.set_description(file)
            streams = [(n, t.shape, t.dtype, _counted(blocks(t), bar)) for n, t in shard.items()]
            write_file(folder / file, streams)
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{WEIGHTS}.index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def copy_files(folders: Iterable[Path], names: Iterable[str], out: Path) -> list[str]:
    """Copies each named file from the first folder that has it; returns what was copied."""
    copied = []
    for name in names:
        for folder in folders:
            if (folder / name).is_file() and not (out / name).exists():
                shutil.copyfile(folder / name, out / name)
                copied.append(name)
    return copied


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + nbytes(tensor) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes(tensor)
    return shards


def _counted(parts: Iterable[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for part in parts:
        yield part
        bar.update(part.nbytes)
