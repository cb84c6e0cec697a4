"""The device mesh: axes `data` (copies of the model), `fsdp` (its shards) and `tensor` (its heads).

A batch is split over `data` and `fsdp`, parameters over `fsdp` and `tensor`. `data` is the outer
axis, so on several slices or hosts it is the one that crosses the slow network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cli_jax.config import ModelConfig
from cli_jax.experiment import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")


def axis_sizes(
    config: MeshConfig, model: ModelConfig, num_devices: int, slices: int = 1
) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) for a number of devices in a number of slices."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    wrong = [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    if sizes["data"] == sizes["fsdp"] == -1 and sizes["tensor"] > 0:
        widths = math.gcd(model.vision.hidden_size, model.text.hidden_size)
        sizes["fsdp"] = math.gcd(num_devices // slices // sizes["tensor"] or 1, widths)
    free = [axis for axis, size in sizes.items() if size == -1]
    if wrong or len(free) > 1:
        raise ConfigError(
            f"config.mesh needs positive sizes and at most one -1 (or data and fsdp), got "
            f"{_show({axis: getattr(config, axis) for axis in AXES})}"
        )
    used = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % used == 0:
        sizes[free[0]] = num_devices // used
    if math.prod(sizes.values()) != num_devices:
        raise ConfigError(
            f"config.mesh {_show(sizes)} does not fill {num_devices} devices: the sizes must "
            f"multiply to {num_devices} (-1 for one of them takes what is left)"
        )
    if sizes["data"] % slices:
        raise ConfigError(
            f"config.mesh.data={sizes['data']} is not a multiple of the {slices} slices: only "
            f"copies of the model may lie in different slices"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def make_mesh(
    config: MeshConfig, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over `devices` (default: all); the compiler places what the rules leave open.

    Devices of several TPU slices are arranged so that only `data` crosses between slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = axis_sizes(config, model, len(devices), slices)
    check_tensor(model, sizes[2])
    types = (AxisType.Auto,) * len(AXES)
    inside = (sizes[0] // slices, *sizes[1:])
    # Split: the sizes need not be those of the torus, 2 x 128 lie on 16 x 16 chips.
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    else:
        arranged = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES, axis_types=types)


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
