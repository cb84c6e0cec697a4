"""How parameters are cut on disk, so that a part of a large one can be read by itself."""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp

PIECE_BYTES = 64 * 2**20


def pieces(params: Any) -> Any:
    """Storage options per leaf: what is larger than a piece is cut, stacked layers one by one.

    Orbax's own choice is one compressed piece per array and device, which whoever wants one layer
    (`convert.py to-hf`) or another sharding has to unpack whole.
    """

    def cut(path: Any, leaf: Any) -> ocp.SaveArgs:
        if leaf.size * leaf.dtype.itemsize <= PIECE_BYTES:
            return ocp.SaveArgs()
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return ocp.SaveArgs(chunk_byte_size=PIECE_BYTES, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(cut, params)
