"""Is a state finite, and is it the one that was saved? One pass over it on the device.

The sums are of integers, so they do not depend on how the arrays are split over devices, and a
checkpoint can be verified on any mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cli_jax.train.state import leaf_paths


def inspect(tree: Any) -> tuple[bool, dict[str, int]]:
    """(all numbers are finite, {path: 32-bit checksum of the leaf's bits and their places})."""
    finite, sums = jax.device_get(_inspect(tree))
    return bool(finite), {path: int(value) for path, value in sums.items()}


@jax.jit
def _inspect(tree: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    leaves = leaf_paths(tree)
    floats = [x for x in leaves.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
    return finite, {path: _checksum(x) for path, x in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd factors permute the 32-bit numbers: a changed bit or a swapped pair changes the sum.
    mixed = (bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA77)
    return jnp.sum(mixed ^ (mixed >> 15), dtype=jnp.uint32)
