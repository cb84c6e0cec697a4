"""Where a checkpoint comes from: a folder, a safetensors file, or a Hugging Face hub id.

Only safetensors are read. Pickles (.bin, .pt, ...) run code when they are loaded and are refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from cli_jax.hf.error import ConversionError
from cli_jax.hf.tensorfile import StoredTensor, read_header

ADAPTER_WEIGHTS = "cli_adapter.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on disk: its tensors by stored name, unread, and its config.json."""

    path: Path
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def open_source(where: str | Path) -> Source:
    """Opens a folder, one .safetensors file, or a hub id (downloaded once, never for a folder).

    Raises ConversionError for pickles, missing shards and files that were cut short.
    """
    path = resolve(where)
    if path.is_file():
        if path.suffix in PICKLES:
            raise _pickle_error(path, [path.name])
        return Source(path, read_header(path), {})
    config = path / "config.json"
    return Source(path, _folder_tensors(path), read_json(config) if config.is_file() else {})


def resolve(where: str | Path) -> Path:
    """The local path of a folder, file or hub id."""
    path = Path(where).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(where)):
        hint = ": copy it into a local or mounted folder" if "://" in str(where) else ""
        raise ConversionError(f"{where} does not exist{hint}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), allow_patterns=["*.safetensors", *_json_files()]))
    except Exception as error:
        raise ConversionError(
            f"{where} is no local folder, and as a hub id it could not be fetched:"
            f" {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _json_files() -> list[str]:
    return ["*.json", "*.safetensors.index.json", "merges.txt", "tokenizer.model", "*.jinja"]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return value


def _folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _indexed(folder, indexes[0])
    files = [f for f in sorted(folder.glob("*.safetensors")) if f.name != ADAPTER_WEIGHTS]
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise _pickle_error(folder, pickles)
        raise ConversionError(f"{folder} holds no .safetensors file")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ConversionError(f"{name} is in both {tensors[name].file} and {file}")
            tensors[name] = tensor
    return tensors


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map", {})
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        file = folder / file_name
        if file.parent != folder or not file.is_file():
            raise ConversionError(f"{index.name} names {file_name}, which is not in {folder}")
        tensors |= read_header(file)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ConversionError(f"{index} names tensors that no file holds: {', '.join(missing[:5])}")
    return tensors


def _pickle_error(path: Path, names: list[str]) -> ConversionError:
    return ConversionError(
        f"{path} holds pickled weights ({names[0]}), which are never loaded: run"
        f" `python convert.py bin-to-safetensors {path} OUT` first"
    )
