"""What no base model has, in a file of its own, tied to the base model it belongs to.

`cli_adapter.safetensors` holds the parameters of the fusion strategy and of the routing under our
paths (`fusion.amp.lora_A`), `cli_adapter.json` both configs and the fingerprint of the base model.
On any other base they mean nothing, so loading them there is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli_jax.config import ModelConfig
from cli_jax.hf.error import ConversionError
from cli_jax.hf.source import ADAPTER_WEIGHTS, read_json
from cli_jax.hf.tensor import Tensor, blocks, fingerprint
from cli_jax.hf.tensorfile import StoredTensor, read_header, write_file

ADAPTER_CONFIG = "cli_adapter.json"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter on disk: tensors by our path, unread."""

    folder: Path
    fusion_name: str
    fusion: dict[str, Any]
    routing: dict[str, Any]
    base: str  # fingerprint
    has_projector: bool  # False: the strategy does without, whatever the base model's is
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> tuple[Path, Path]:
        return self.folder / ADAPTER_WEIGHTS, self.folder / ADAPTER_CONFIG


def write_adapter(
    folder: Path, model: ModelConfig, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> None:
    """Writes both files. tensors: by our path.

    base: the tensors of the model without strategy and routing, by canonical name.
    """
    streams = [
        (path.replace("/", "."), tensor.shape, tensor.dtype, blocks(tensor))
        for path, tensor in tensors.items()
    ]
    write_file(folder / ADAPTER_WEIGHTS, streams)
    config = {
        "fusion": {
            "name": model.fusion_name,
            model.fusion_name: dataclasses.asdict(model.fusion),
        },
        "routing": dataclasses.asdict(model.routing),
        "base_fingerprint": fingerprint(base),
        "has_projector": any(map(_of_projector, base)),
        "tensors": {path: list(tensor.shape) for path, tensor in tensors.items()},
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in a folder, if there is one."""
    weights, config = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    if not weights.exists() and not config.exists():
        return None
    for file in (weights, config):
        if not file.is_file():
            raise ConversionError(f"an adapter needs both its files: {file} is missing")
    values = read_json(config)
    try:
        name = values["fusion"]["name"]
        tensors = {n.replace(".", "/"): t for n, t in read_header(weights).items()}
        routing = values.get("routing", {"name": "none"})
        base, has_projector = values["base_fingerprint"], values.get("has_projector", True)
        return Adapter(folder, name, values["fusion"][name], routing, base, has_projector, tensors)
    except (KeyError, TypeError) as error:
        raise ConversionError(f"{config} is not an adapter's description: {error!r}") from error


def open_adapter(folder: Path, model: ModelConfig, base: Mapping[str, Tensor]) -> Adapter | None:
    """The folder's adapter for a model with the base tensors `base` (by canonical name).

    An adapter without routing serves a model with one, whose parameters are new then. Raises
    ConversionError if it belongs to another strategy, routing, config or base model.
    """
    adapter = read_adapter(folder)
    if adapter is None:
        return None
    remedy = f"or remove {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} to use the base model alone"
    if adapter.fusion_name != model.fusion_name:
        raise ConversionError(
            f"{folder} holds an adapter for config.fusion.name={adapter.fusion_name}, the model has"
            f" {model.fusion_name}: change it, {remedy}"
        )
    _same_config(folder, f"fusion.{adapter.fusion_name}", adapter.fusion, model.fusion)
    if adapter.routing["name"] != "none":
        _same_config(folder, "routing", adapter.routing, model.routing)
    check_base(adapter, base)
    return adapter


def _same_config(folder: Path, name: str, stored: Mapping[str, Any], config: Any) -> None:
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    differ = [
        f"{key}: adapter {stored.get(key)!r}, model {ours.get(key)!r}"
        for key in sorted(ours.keys() | stored.keys())
        if ours.get(key) != stored.get(key)
    ]
    if differ:
        raise ConversionError(
            f"{folder} holds an adapter with another config.{name}:\n  " + "\n  ".join(differ)
        )


def check_base(adapter: Adapter, base: Mapping[str, Tensor]) -> None:
    """Refuses a base model that is not, value for value, the adapter's own."""
    if not adapter.has_projector:
        base = {name: tensor for name, tensor in base.items() if not _of_projector(name)}
    found = fingerprint(base)
    if found != adapter.base:
        raise ConversionError(
            f"the adapter in {adapter.folder} belongs to the base model {adapter.base}, not to this"
            f" one, {found}: give it the base it was trained on (with the same vocabulary rows)"
        )


def _of_projector(name: str) -> bool:
    return name.startswith("multi_modal_projector.")


def match(adapter: Adapter, wanted: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The adapter's tensors, if they are exactly `wanted` ({path: anything with a shape}).

    An adapter without routing need not have the routing's.
    """
    if adapter.routing["name"] == "none":
        wanted = {p: x for p, x in wanted.items() if not p.startswith("routing/")}
    lines = [
        f"missing {p}: expected {list(x.shape)}"
        for p, x in wanted.items()
        if p not in adapter.tensors
    ]
    lines += [
        f"extra   {p}: found {list(t.shape)}" for p, t in adapter.tensors.items() if p not in wanted
    ]
    lines += [
        f"wrong   {p}: expected {list(wanted[p].shape)}, found {list(t.shape)}"
        for p, t in adapter.tensors.items()
        if p in wanted and tuple(wanted[p].shape) != t.shape
    ]
    if lines:
        raise ConversionError("\n  ".join([f"{adapter.folder}: the adapter does not fit:", *lines]))
    return adapter.tensors
