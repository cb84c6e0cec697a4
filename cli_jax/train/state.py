"""What training carries from step to step, and how parameters are named and split.

A parameter's path is its keys joined by "/", e.g. `language_model/norm/scale`; it is what the
regular expressions of `config.optimizer.groups` are matched against.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import flax
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """step int32 [] = updates done; params = the whole tree; opt_state = of trained leaves only."""

    step: jax.Array
    params: Params
    opt_state: Any


def flatten(params: Params) -> dict[str, Any]:
    """Nested parameters -> {path: leaf}."""
    return flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """{path: leaf} -> nested parameters."""
    return unflatten_dict(dict(leaves), sep="/")


def split(params: Params, paths: Collection[str]) -> tuple[Params, Params]:
    """Two nested trees: the leaves named by `paths`, and the others."""
    leaves = flatten(params)
    inside = {path: leaf for path, leaf in leaves.items() if path in paths}
    outside = {path: leaf for path, leaf in leaves.items() if path not in paths}
    return unflatten(inside), unflatten(outside)


def merge(first: Params, second: Params) -> Params:
    """The inverse of `split`."""
    return unflatten({**flatten(first), **flatten(second)})


def leaf_paths(tree: Any) -> dict[str, Any]:
    """{path: leaf} of any tree: dictionaries, named tuples (by field) and lists (by index)."""
    entries, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in entries}
