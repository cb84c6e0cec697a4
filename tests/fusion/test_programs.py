"""What the compiled and lowered programs contain: where vision and the bank are, and are not."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from cli_jax.fusion.cli import CLIConfig
from cli_jax.fusion.layer_concat import LayerConcatConfig
from cli_jax.fusion.sli import SLIConfig
from cli_jax.model.decoder import Cache
from tests.fusion import tiny

CONFIG = CLIConfig(taps=(1, 3, 5), inject=(0, 2, 3), rank=4)
K, B, P, D = 3, 2, tiny.SIZES["visual"], tiny.TEXT.hidden_size
V = tiny.VISION.hidden_size


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_decoding_does_no_vision_and_no_injection():
    """One token's program takes the language model's parameters and nothing of the rest."""
    m, c, slots = tiny.model(CONFIG), tiny.TEXT, 128
    params = shapes(tiny.redrawn(CONFIG))
    heads = (c.num_hidden_layers, B, slots, c.num_key_value_heads, c.head_dim)
    cache = Cache(*(jax.ShapeDtypeStruct(heads, jnp.float32),) * 2)
    ids = jax.ShapeDtypeStruct((B,), jnp.int32)
    slot, valid = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((B, slots), bool)

    def decode(params, *args):
        hidden, cache = m.apply({"params": params}, *args, method="decode")
        return m.apply({"params": params}, hidden, method="logits"), cache

    compiled = jax.jit(decode).lower(params, ids, ids, slot, valid, cache).compile()
    inputs = params["language_model"], ids, ids, slot, valid, cache
    assert compiled.memory_analysis().argument_size_in_bytes == size(inputs)
    assert used(compiled.as_text()) == {"language_model"}  # the head is tied
    assert f"{P},{D}]" not in compiled.as_text()

    def prefill(params, batch):
        return m.apply({"params": params}, batch, slots, method="prefill")

    whole = jax.jit(prefill).lower(params, shapes(tiny.packed())).as_text(debug_info=True)
    assert used(whole) == set(params) > {"language_model", "vision_tower", "fusion"}


def used(program):
    """The model's parts whose parameters a program takes."""
    return set(re.findall(r"params\[\\?'(\w+)", program))


def bank_lines(layers, inject, *, gradient):
    """Lines of the unrolled program, before XLA, in which an array of the bank's shape occurs."""
    text = dataclasses.replace(tiny.TEXT, num_hidden_layers=layers)
    m = tiny.model(dataclasses.replace(CONFIG, inject=inject), text=text, scan_layers=False)
    batch = tiny.packed()
    params = jax.eval_shape(lambda: m.init(jax.random.key(0), batch)["params"])

    def total(params, batch):
        return jnp.sum(m.apply({"params": params}, batch).hidden)

    f = jax.grad(total) if gradient else total
    lowered = jax.jit(f).lower(params, shapes(batch)).as_text()
    return len(re.findall(rf"tensor<{K}x{B}x{P}x{D}xf32>", lowered))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_layers_without_injection_touch_no_bank(gradient):
    few = bank_lines(4, (0, 2), gradient=gradient)
    assert few > 0
    assert (
        bank_lines(12, (0, 6), gradient=gradient) == few
    )  # eight more layers, no more of the bank
    assert bank_lines(4, (0, 1, 2, 3), gradient=gradient) > few  # two more injections


@pytest.mark.parametrize(
    ("config", "width", "kept"),
    [
        (CONFIG, D, False),
        (dataclasses.replace(CONFIG, taps=(1, 3, (4, 5))), D, True),
        (SLIConfig(taps=(1, 3, 5)), D, False),
        (SLIConfig(taps=(1, 3, (4, 5))), D, True),
        (LayerConcatConfig(layers=(1, 3, 5)), V, False),
    ],
    ids=["cli", "cli_means", "sli", "sli_means", "layer_concat"],
)
def test_the_states_of_tapped_layers_are_not_kept(config, width, kept):
    """They become features of slots where they arise. Means of layers have to wait for all."""
    m, batch = tiny.model(config, scan_layers=True, remat="full"), tiny.packed()
    patches = batch["plan_inverse"].shape[1]

    def total(params):
        return jnp.sum(m.apply({"params": params}, batch).hidden)

    traced = jax.make_jaxpr(jax.grad(total))(tiny.redrawn(config))
    assert ((K, B, patches, V) in tiny.everything(traced.jaxpr)) == kept
    assert (K, B, P, width) in tiny.everything(traced.jaxpr)
