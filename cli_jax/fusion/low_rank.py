"""LoRA branches, one per entry of a stack: x A_i B_i, zero at the start."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from cli_jax.model.layers import partitioned


class LowRank(nn.Module):
    """A [count, width_in, r] random, B [count, r, width_out] zeros.

    stack, axis_in: logical axes (parallel/rules.py) of the entries and of what is read.
    """

    stack: str
    count: int
    rank: int
    axis_in: str
    param_dtype: Any

    @nn.compact
    def __call__(self, width_in: int, width_out: int) -> tuple[jax.Array, jax.Array]:
        def param(name: str, init: Any, axes: tuple[str, str], shape: tuple[int, int]) -> jax.Array:
            init = partitioned(init, (self.stack, *axes))
            return self.param(name, init, (self.count, *shape), self.param_dtype)

        random, zeros = nn.initializers.normal(width_in**-0.5), nn.initializers.zeros
        A = param("lora_A", random, (self.axis_in, "rank"), (width_in, self.rank))
        B = param("lora_B", zeros, ("rank", "embed"), (self.rank, width_out))
        return A, B
