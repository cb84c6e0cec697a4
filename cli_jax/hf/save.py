"""Our parameters -> a folder that transformers loads; the part that all conversions share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.hf import names
from cli_jax.hf.checkpoint import CONVERSION
from cli_jax.hf.config_out import check_image_token, config_json, preprocessor_json
from cli_jax.hf.source import SIDE_FILES
from cli_jax.hf.tensor import Cast, Tensor
from cli_jax.hf.write import copy_files, write_json, write_tensors

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR_FILES = (PREPROCESSOR, "processor_config.json", "video_preprocessor_config.json")


class Array(Protocol):
    """One of our parameters, wherever it is; `read` returns a box of it on the host."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: tuple[slice | int, ...]) -> np.ndarray: ...


class Stored:
    """One of our arrays, or one layer of it, seen as the stored tensor it came from."""

    def __init__(self, array: Array, leaf: names.Leaf, layer: int | None) -> None:
        self.array, self.layer, self.dtype = array, layer, array.dtype
        self.row_axis = leaf.axes.index(0)
        self.back = tuple(int(a) for a in np.argsort(leaf.axes))
        ours = leaf.shape[leaf.stacked :]
        self.shape = tuple(ours[a] for a in self.back)

    def read(self, start: int, stop: int) -> np.ndarray:
        index: list[slice | int] = [slice(None)] * len(self.shape)
        index[self.row_axis] = slice(start, stop)
        if self.layer is not None:
            index.insert(0, self.layer)
        return self.array.read(tuple(index)).transpose(self.back)


@dataclasses.dataclass(frozen=True)
class Model:
    """A base model on its way out: tensors by canonical name, unread.

    appended_from: the first vocabulary row that the conversion adds, if it does.
    """

    vision: VisionConfig
    text: TextConfig
    image: ImageConfig
    has_newline: bool
    tokens: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    appended_from: int | None = None


def stored_tensors(
    arrays: Mapping[str, Array], model: ModelConfig, *, has_projector: bool
) -> tuple[dict[str, Tensor], dict[str, Array]]:
    """Our parameters by path -> (base tensors by canonical name, those no base model has)."""
    wanted = names.expected(
        model.vision, model.text, has_newline=model.has_newline, has_projector=has_projector
    )
    leaves = names.leaves(wanted)
    tensors: dict[str, Tensor] = {}
    for path, leaf in leaves.items():
        for i, name in enumerate(leaf.names):
            tensors[name] = Stored(arrays[path], leaf, i if leaf.stacked else None)
    return tensors, {path: array for path, array in arrays.items() if path not in leaves}


def cast(tensors: Mapping[str, Tensor], dtype: np.dtype) -> dict[str, Tensor]:
    """Every tensor in one dtype; those that have it already are left alone."""
    return {n: t if t.dtype == dtype else Cast(n, t, dtype) for n, t in tensors.items()}


def write_model(
    folder: Path,
    model: Model,
    *,
    side_folders: Sequence[Path] = (),
    own_preprocessor: bool = False,
    needs_image_token: bool = False,
    max_shard_gb: float = 5.0,
    progress: bool = False,
) -> list[str]:
    """Writes weights, config.json and side files into an existing folder; returns the latter.

    side_folders: where tokenizer and processor files are copied from.
    own_preprocessor: writes how `model.image` treats pictures instead of copying what is found.
    needs_image_token: transformers must be able to look the `<image>` id up.
    """
    config = config_json(
        model.vision,
        model.text,
        model.image,
        has_newline=model.has_newline,
        dtype=_widest(model.tensors),
        tokens=model.tokens,
        appended_from=model.appended_from,
    )
    if needs_image_token:
        check_image_token(config)
    wanted = [n for n in SIDE_FILES if not (own_preprocessor and n in PROCESSOR_FILES)]
    copied = copy_files(side_folders, wanted, folder)
    if PREPROCESSOR not in copied:
        write_json(folder / PREPROCESSOR, preprocessor_json(model.vision, model.image))
    stored = {names.hub(name): tensor for name, tensor in model.tensors.items()}
    write_tensors(folder, stored, max_shard_gb=max_shard_gb, progress=progress)
    write_json(folder / "config.json", config)
    return copied


def write_report(
    folder: Path,
    command: str,
    tensors: Mapping[str, Tensor],
    origin: Mapping[str, str],
    absent: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Writes conversion.json: what came from where, and what the model is to initialize."""
    report = {
        "command": command,
        "components": [
            _component(part, [n for n in tensors if n.split(".")[0] == part], tensors, origin)
            for part in names.BASE
            if any(n.split(".")[0] == part for n in tensors)
        ],
        "initialize": list(absent),
        "notes": list(notes),
    }
    write_json(folder / CONVERSION, report)
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    rows = [("component", "tensors", "parameters", "dtype", "from")]
    rows += [
        (
            c["component"],
            str(c["tensors"]),
            f"{c['parameters']:,}",
            c["dtype"],
            ", ".join(c["from"]),
        )
        for c in report["components"]
    ]
    rows += [(name, "", "", "", "initialized at the start") for name in report["initialize"]]
    w = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{w[0]}}  {b:>{w[1]}}  {c:>{w[2]}}  {d:<{w[3]}}  {e}" for a, b, c, d, e in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _component(
    part: str, members: list[str], tensors: Mapping[str, Tensor], origin: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "component": part,
        "tensors": len(members),
        "parameters": sum(int(np.prod(tensors[n].shape)) for n in members),
        "dtype": "/".join(sorted({tensors[n].dtype.name for n in members})),
        "from": sorted({origin[n].split(": ")[0] for n in members if n in origin}),
    }


def _widest(tensors: Mapping[str, Tensor]) -> str:
    """The dtype transformers should load: the only one there is, else float32, which loses none."""
    kinds = Counter(t.dtype.name for t in tensors.values())
    return next(iter(kinds)) if len(kinds) == 1 else "float32"
