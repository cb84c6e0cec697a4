"""Logical axis rules: which mesh axis splits each named axis of a parameter or activation.

Model code names its axes ("embed", "mlp", ...) and knows no mesh; this table is the only place
where the names meet one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cli_jax.config import ModelConfig

MeshAxes = tuple[str, ...]
SPLIT_BATCH: MeshAxes = ("data", "fsdp")
WHOLE: MeshAxes = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. Weights are split over `fsdp` along widths and over `tensor`
    along heads, hidden units and vocabulary; what is small (norms, gates, adapters' ranks) or
    walked by a scan (layers) stays whole."""

    batch: MeshAxes = SPLIT_BATCH
    length: MeshAxes = WHOLE
    embed: MeshAxes = ("fsdp",)
    mlp: MeshAxes = ("tensor",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    vision_embed: MeshAxes = ("fsdp",)
    vision_mlp: MeshAxes = ("tensor",)
    vision_heads: MeshAxes = ("tensor",)
    norm: MeshAxes = WHOLE
    layers: MeshAxes = WHOLE
    taps: MeshAxes = WHOLE
    points: MeshAxes = WHOLE
    rank: MeshAxes = WHOLE

    def __getitem__(self, name: str | None) -> MeshAxes:
        """The mesh axes of one logical axis; None is an axis without a name, kept whole."""
        if name is None:
            return WHOLE
        if not hasattr(self, name):
            raise KeyError(f"no rule for the logical axis {name!r}: add it to parallel/rules.py")
        return getattr(self, name)

    def pairs(self) -> list[tuple[str, MeshAxes | None]]:
        """The table as `flax.linen.logical_axis_rules` wants it."""
        return [(f.name, getattr(self, f.name) or None) for f in dataclasses.fields(self)]

    @contextlib.contextmanager
    def on(self, mesh: Mesh) -> Iterator[None]:
        """The mesh and these rules, for everything that is traced inside."""
        with jax.set_mesh(mesh), nn.logical_axis_rules(self.pairs()):
            yield


def rules_for(model: ModelConfig, mesh: Mesh) -> tuple[Rules, tuple[str, ...]]:
    """The rules for a model on a mesh, and a note for every head axis that cannot be split.

    Key-value heads and vision heads that the tensor size does not divide are kept whole: a weight
    could be cut inside a head, but every attention would then have to put the heads together.
    """
    tensor, whole, notes = mesh.shape["tensor"], {}, []
    for name, heads in (
        ("kv_heads", model.text.num_key_value_heads),
        ("vision_heads", model.vision.num_attention_heads),
    ):
        if heads % tensor:
            whole[name] = WHOLE
            notes.append(f"{name}: {heads} heads are not divisible by tensor={tensor}: replicated")
    return dataclasses.replace(Rules(), **whole), tuple(notes)


def spec(
    name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, rules: Rules
) -> tuple[PartitionSpec, list[str]]:
    """How one array is split, and a note for each dimension that a mesh axis does not divide.

    Such a dimension is replicated. Two dimensions on one mesh axis are an error: the table has to
    say which of them is split.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: logical axes {axes} do not name the dimensions of {shape}")
    parts: list[MeshAxes | str | None] = []
    notes: list[str] = []
    taken: dict[str, str | None] = {}
    for size, logical in zip(shape, axes, strict=True):
        mesh_axes = tuple(axis for axis in rules[logical] if mesh.shape[axis] > 1)
        for axis in mesh_axes:
            if axis in taken:
                raise ValueError(
                    f"{name}: the logical axes {taken[axis]!r} and {logical!r} are both split "
                    f"over {axis!r}; rename one of them in the model"
                )
            taken[axis] = logical
        count = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % count:
            shown = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axes)
            notes.append(f"{name}: {logical} {size} is not divisible by {shown}: replicated")
            mesh_axes = WHOLE
        parts.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*parts), notes


def shard_params(
    boxed: dict[str, Any], mesh: Mesh, rules: Rules
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Abstract parameters with their shardings, from `jax.eval_shape(model.init, ...)["params"]`.

    Returns the unboxed tree of `jax.ShapeDtypeStruct` (with `.sharding`) and the notes of `spec`.
    """
    notes: list[str] = []

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        is_box = isinstance(leaf, nn.Partitioned)
        value = leaf.value if is_box else leaf
        axes = leaf.names if is_box else (None,) * len(value.shape)
        name = "/".join(key.key for key in path)
        placed, more = spec(name, value.shape, axes, mesh, rules)
        notes.extend(more)
        sharding = NamedSharding(mesh, placed)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    placed = jax.tree_util.tree_map_with_path(
        place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
    return placed, tuple(notes)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """How every array of a batch is split: along its rows."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))
