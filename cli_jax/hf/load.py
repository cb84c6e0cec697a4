"""Hugging Face checkpoints -> our parameters, straight into sharded arrays.

Every array is made leaf by leaf from the slices that this process's devices hold; a stacked leaf is
assembled layer by layer. There is never a second copy of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from cli_jax.config import ModelConfig
from cli_jax.fusion import registry
from cli_jax.hf import adapter, names
from cli_jax.hf.checkpoint import read
from cli_jax.hf.error import ConversionError
from cli_jax.hf.tensor import Tensor, spans

Index = Any  # a tuple of slices, one per axis


@dataclasses.dataclass(frozen=True)
class Loaded:
    """params: nested, with the leaves the checkpoint has. missing: paths of the others.

    notes: what was left out of the checkpoint or added to it.
    """

    params: dict[str, Any]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def load_params(
    source: str | Path,
    model: ModelConfig,
    abstract_params: Mapping[str, Any],
    *,
    shardings: Mapping[str, Any] | None = None,
    pad_vocab: bool = False,
    base_only: bool = False,
    progress: bool = False,
) -> Loaded:
    """Reads a folder or hub id in any known layout into arrays of `abstract_params`' dtypes.

    abstract_params: nested `jax.ShapeDtypeStruct` (unboxed) of the whole model; its shardings are
    used unless `shardings` gives others, and the first device where there are none.
    pad_vocab: lets the model have more vocabulary rows than the checkpoint (the mean row is added).
    base_only: leaves an adapter in the folder aside.
    Missing are allowed to be: the parameters of a fusion strategy and of a routing, unless the
    folder carries an adapter with them; `image_newline`; and what the conversion that wrote the
    folder left open.
    Raises ConversionError listing every other difference with expected and found shapes.
    """
    names.check_projector(model)
    checkpoint = read(source, model=model, vocab_size=model.text.vocab_size if pad_vocab else None)
    abstract = flatten_dict(dict(abstract_params), sep="/")
    placed = flatten_dict(dict(shardings), sep="/") if shardings is not None else {}
    wanted = names.expected(
        model.vision,
        model.text,
        has_newline=model.has_newline,
        has_projector=registry.of(model).has_plain_projector(model.fusion),
    )
    base = names.leaves(wanted)
    _check_model(abstract, base)
    readers: dict[str, Callable[[Index], np.ndarray]] = {}
    for path, leaf in base.items():
        if not set(leaf.names) & set(checkpoint.absent):
            readers[path] = _leaf_reader(leaf, checkpoint.tensors, abstract[path])
    own = {path: leaf for path, leaf in abstract.items() if path not in base}
    found = None
    if not base_only:
        found = adapter.open_adapter(checkpoint.source.folder, model, checkpoint.tensors)
    for path, tensor in adapter.match(found, own).items() if found else ():
        readers[path] = _plain_reader(tensor, abstract[path])
    unused = [name for name in checkpoint.tensors if name not in wanted]
    notes = checkpoint.notes
    if unused:
        notes += (
            f"fusion strategy {model.fusion_name!r} has no use for {len(unused)} tensors of the"
            f" checkpoint, e.g. {unused[0]}",
        )
    params = {
        path: jax.make_array_from_callback(
            abstract[path].shape, placed.get(path) or _sharding(abstract[path]), readers[path]
        )
        for path in tqdm(readers, desc="loading", unit="array", disable=not progress)
    }
    missing = tuple(path for path in abstract if path not in params)
    return Loaded(unflatten_dict(params, sep="/"), missing, notes)


def make_arrays(
    leaves: Mapping[str, names.Leaf], tensors: Mapping[str, Tensor], abstract: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Leaves by path, read from stored tensors into the dtypes and shardings of `abstract`."""
    return {
        path: jax.make_array_from_callback(
            leaf.shape, _sharding(abstract[path]), _leaf_reader(leaf, tensors, abstract[path])
        )
        for path, leaf in leaves.items()
    }


def _check_model(abstract: Mapping[str, Any], base: Mapping[str, names.Leaf]) -> None:
    """The base model's parameters must be those that the name map knows."""
    modules = set(names.BASE)
    if not any(path.startswith(names.PROJECTOR) for path in base):
        modules.remove(names.PROJECTOR)  # the fusion strategy has its own or does without
    wrong = [
        f"{path}: name map {leaf.shape}, model {abstract[path].shape if path in abstract else None}"
        for path, leaf in base.items()
        if path not in abstract or tuple(abstract[path].shape) != leaf.shape
    ]
    wrong += [
        f"{path}: unknown to the name map"
        for path in abstract
        if path.split("/")[0] in modules and path not in base
    ]
    if wrong:
        raise ConversionError("\n  ".join(["the model is not the one of its config:", *wrong]))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _plain_reader(tensor: Tensor, leaf: Any) -> Callable[[Index], np.ndarray]:
    def callback(index: Index) -> np.ndarray:
        start, stop, _ = index[0].indices(leaf.shape[0])
        return tensor.read(start, stop)[(slice(None), *index[1:])].astype(leaf.dtype)

    return callback


def _leaf_reader(
    leaf: names.Leaf, tensors: Mapping[str, Tensor], abstract: Any
) -> Callable[[Index], np.ndarray]:
    """Reads any box of one of our leaves from its stored tensors."""

    def callback(index: Index) -> np.ndarray:
        ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], abstract.dtype)
        if not leaf.stacked:
            _fill(out, tensors[leaf.names[0]], leaf.axes, index)
        else:
            for i, layer in enumerate(ranges[0]):
                _fill(out[i], tensors[leaf.names[layer]], leaf.axes, index[1:])
        return out

    return callback


def _fill(out: np.ndarray, tensor: Tensor, axes: tuple[int, ...], index: Index) -> None:
    """Writes the box `index` (in our axes) of a stored tensor into `out`, in blocks of rows."""
    stored_index = [slice(None)] * len(axes)
    for ours, theirs in enumerate(axes):
        stored_index[theirs] = index[ours]
    row_axis = axes.index(0)
    first, last, _ = stored_index[0].indices(tensor.shape[0])
    for start, stop in spans(tensor):
        low, high = max(start, first), min(stop, last)
        if low < high:
            block = tensor.read(low, high)[(slice(None), *stored_index[1:])]
            place = [slice(None)] * len(axes)
            place[row_axis] = slice(low - first, high - first)
            out[tuple(place)] = block.transpose(axes)
