"""The device mesh: axes `data` (copies of the model), `fsdp` (its shards) and `tensor` (its heads).

A batch is split over `data` and `fsdp`, parameters over `fsdp` and `tensor`. `data` is the outer
axis, so on several slices or hosts it is the one that crosses the slow network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from cli_jax.config import ModelConfig
from cli_jax.experiment import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")


def axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) for a number of devices; -1 takes what is left."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    wrong = [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if wrong or len(free) > 1:
        raise ConfigError(
            f"config.mesh needs positive sizes and at most one -1, got {_show(sizes)}"
        )
    used = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % used == 0:
        sizes[free[0]] = num_devices // used
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"config.mesh {_show(sizes)} does not fill {num_devices} devices: the sizes must "
            f"multiply to {num_devices} (-1 for one of them takes what is left)"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(
    config: MeshConfig, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over `devices` (default: all); the compiler places what the rules leave open."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    check_tensor(model, sizes[2])
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_tensor(model: ModelConfig, tensor: int) -> None:
    """Refuses a tensor size that would cut a decoder attention head in two."""
    heads = model.text.num_attention_heads
    if heads % tensor:
        good = [size for size in range(1, heads + 1) if heads % size == 0]
        raise ConfigError(
            f"config.mesh.tensor={tensor} does not divide the {heads} attention heads of the "
            f"decoder; sizes that do: {good}"
        )


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _show(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())
