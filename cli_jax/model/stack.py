"""Stacks of equal layers: one set of parameters with a leading `layers` axis, run by `lax.scan`.

The stack can be *visited* before chosen layers: a vision tower emits the hidden state there (a
tap), a decoder adds visual features there (an injection point). Layers between visits run as plain
scans, so a layer that is not visited carries nothing of what a visit needs, forward or backward.
Equally spaced visits become one outer scan, so the compiled program does not grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.model.remat import rematerialize

PyTree = Any
Body = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


def stacked_params(
    module: nn.Module, name: str, block: nn.Module, length: int, *example: Any
) -> PyTree:
    """Declares `length` copies of `block`'s parameters in `module`, stacked on axis 0."""

    def init(key: jax.Array) -> PyTree:
        def one(key: jax.Array) -> PyTree:
            return block.init(key, *example)["params"]

        stacked = jax.vmap(one)(jax.random.split(key, length))
        return jax.tree.map(
            lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}),
            stacked,
            is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
        )

    return module.param(name, init)


class Group(NamedTuple):
    """`visits` visits, each followed by `size` layers; the first one is before layer `start`."""

    start: int
    size: int
    visits: int


def group_visits(points: Sequence[int], stop: int) -> list[Group]:
    """Splits visits before layers `points` (ascending) of layers [0, stop) into equal groups."""
    sizes = [b - a for a, b in zip(points, [*points[1:], stop], strict=True)]
    if any(size < 0 for size in sizes) or 0 in sizes[:-1]:
        raise ValueError(f"visit points {tuple(points)} must ascend and not pass layer {stop}")
    groups: list[Group] = []
    for point, size in zip(points, sizes, strict=True):
        if groups and groups[-1].size == size:
            groups[-1] = groups[-1]._replace(visits=groups[-1].visits + 1)
        else:
            groups.append(Group(point, size, 1))
    return groups


def run(
    body: Body,
    carry: PyTree,
    layers: PyTree,
    *,
    stop: int,
    unroll: bool,
    points: Sequence[int] = (),
    visit: Body | None = None,
    visits: PyTree = None,
    add: bool = False,
    remat: str = "none",
) -> tuple[PyTree, PyTree]:
    """Runs layers [0, stop) of a stack, calling `visit` before each layer in `points`.

    body(carry, layer) -> (carry, None); `layers` is a tree with a leading axis >= stop.
    visit(carry, visits[i]) -> (carry, out); `visits` has a leading axis len(points).
    Returns the carry and the visits' outputs stacked on axis 0 (None without points) or, with
    `add`, their sum: it is added up on the way, and nothing else of them is kept. The numbers
    depend neither on `unroll` nor on how the points cut the stack into scans. `remat` is what the
    backward pass finds (`remat.py`): with "full" the carry before every layer; a visit and the
    layer behind it are one step then, so that the carry between them is not kept, too.
    """

    layer = _settled(body)
    body = rematerialize(layer, remat, looped=not unroll)
    visit = visit and _settled(visit)
    carry = jax.lax.optimization_barrier(carry)

    def scan(f: Body, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(f, carry, xs, length, unroll=True if unroll else 1)

    def part(tree: PyTree, start: int, stop: int) -> PyTree:
        # A slice of the whole stack is the stack itself: no copy of the parameters.
        return jax.tree.map(
            lambda x: x if (start, stop) == (0, x.shape[0]) else x[start:stop], tree
        )

    first = points[0] if points else stop
    if first:
        carry, _ = scan(body, carry, part(layers, 0, first), first)
    if not points:
        return carry, None
    assert visit is not None

    def visit_then_layer(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        one_visit, one_layer = xs
        carry, out = visit(carry, one_visit)
        if one_layer is not None:
            carry, _ = layer(carry, one_layer)
        return carry, out

    def visit_then_run(state: PyTree, xs: PyTree, looped: bool) -> tuple[PyTree, PyTree]:
        (carry, total), (one_visit, some_layers) = state, xs
        first = jax.tree.map(lambda x: x[0], some_layers)
        if not looped:
            # Backward, the gradients of this step's weights before anything that follows: put off,
            # they hold its activations meanwhile.
            carry, one_visit, first = jax.lax.optimization_barrier((carry, one_visit, first))
        step = rematerialize(visit_then_layer, remat, looped=looped)
        carry, out = step(carry, (one_visit, first))
        if some_layers is not None:
            rest = jax.tree.map(lambda x: x[1:], some_layers)
            length = jax.tree.leaves(rest)[0].shape[0]
            if remat == "offload":
                # Kept by a loop in a loop, the carries would be fetched from the host by two
                # indices at once, which the TPU's compiler cannot do (libtpu 0.0.42).
                alone = rematerialize(layer, remat, looped=looped)
                for i in range(length):
                    carry, _ = alone(carry, jax.tree.map(lambda x, i=i: x[i], rest))
            elif length:
                carry, _ = scan(body, carry, rest, length)
        if add:  # not in a rematerialized step, which would keep every sum so far
            total, out = jax.tree.map(jnp.add, total, out), None
        return (carry, total), out

    outs, done, total = [], 0, None
    if add:
        _, one = jax.eval_shape(visit, carry, jax.tree.map(lambda x: x[0], visits))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    for start, size, count in group_visits(points, stop):
        some_layers = None
        if size:
            some_layers = jax.tree.map(
                lambda x, size=size, count=count: x.reshape(count, size, *x.shape[1:]),
                part(layers, start, start + size * count),
            )
        # A loop of one turn is none to the compiler, and an unrolled one is none at all.
        group = functools.partial(visit_then_run, looped=count > 1 and not unroll)
        (carry, total), out = scan(
            group, (carry, total), (part(visits, done, done + count), some_layers), count
        )
        outs.append(out)
        done += count
    if add:
        return carry, total
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def _settled(f: Body) -> Body:
    """The same step, its carry rounded to its own dtype before anything else reads it.

    XLA may keep a bfloat16 value in float32 across operations that it compiles together, and what
    it compiles together changes with the scans. The barrier stops that between layers.
    """

    def step(carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        carry, out = f(carry, x)
        return jax.lax.optimization_barrier(carry), out

    return step
