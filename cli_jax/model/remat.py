"""What the backward pass finds and what it computes again: rematerialization policies by name.

none            everything is kept
dots            all products are kept
dots_no_batch   products of activations with weights are kept, those of attention are not
attention       a layer's input and its attention's output are kept
full            a layer's input is kept
offload         a layer's input is kept in the host's memory
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

LAYER_INPUT, ATTENTION = "layer_input", "attention"
_policies = jax.checkpoint_policies
POLICIES: dict[str, Callable | None] = {
    "dots": _policies.dots_saveable,
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    "attention": _policies.save_only_these_names(LAYER_INPUT, ATTENTION),
    "full": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def rematerialize(function: Callable, policy: str, *, looped: bool = True) -> Callable:
    """Wraps a function so that its backward pass recomputes what the named policy does not save.

    `looped`: it runs inside a loop that stays one. Outside of it the compiler would find the same
    values computed twice, and keep the first.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=not looped)


def layer_input(x: jax.Array) -> jax.Array:
    """Marks a layer's input for the policies."""
    return checkpoint_name(x, LAYER_INPUT)


def attention_output(x: jax.Array) -> jax.Array:
    """Marks an attention's output for the policies."""
    return checkpoint_name(x, ATTENTION)
