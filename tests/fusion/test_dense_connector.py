"""DenseConnector's layers and its running sums; what it computes is in model/test_fused_parity."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.config import VisionConfig
from cli_jax.fusion.dense_connector import POOL, DenseConnector, DenseConnectorConfig
from cli_jax.image.extras import NO_EXTRAS, Extras
from tests.fusion import tiny
from tests.train import train_tiny

SIGLIP = VisionConfig()
CLIP = VisionConfig(model_type="clip", num_hidden_layers=24, image_size=336, hidden_size=1024)
STI, SCI, DCI = (DenseConnectorConfig(variant) for variant in ("sti", "sci", "dci"))


def test_layers_are_the_published_ones():
    for vision in (CLIP, SIGLIP):
        for config in (STI, SCI):
            assert DenseConnector.taps(config, vision) == ((7,), (15,))
    assert DenseConnector.taps(DCI, CLIP) == (tuple(range(12)), tuple(range(12, 24)))
    assert DenseConnector.taps(DCI, SIGLIP) == (tuple(range(13)), tuple(range(13, 26)))
    assert DenseConnector.vision_layers(DCI, CLIP) == tuple(range(24))  # base h_23 is one of them
    assert DenseConnector.vision_layers(DCI, SIGLIP) == tuple(range(27))
    assert DenseConnector.vision_layers(SCI, SIGLIP) == (7, 15, 26)


def test_other_depths():
    def tower(layers):
        return dataclasses.replace(SIGLIP, num_hidden_layers=layers)

    assert DenseConnector.taps(DCI, tower(5)) == ((0, 1), (2, 3, 4))
    assert DenseConnector.taps(SCI, tower(3)) == ((0,), (1,))
    for config, layers, message in (
        (DCI, 1, "dci needs 2 vision layers or more, not 1"),
        (STI, 2, r"2 vision layers have no thirds: set fusion\.dense_connector\.taps"),
        (dataclasses.replace(SCI, taps=(9,)), 5, r"unknown vision layer \[9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DenseConnector.taps(config, tower(layers))
    with pytest.raises(ValueError, match=r"taps=\(3,\): dci takes the means of all layers"):
        dataclasses.replace(DCI, taps=(3,))
    with pytest.raises(ValueError, match=r"taps \(3, 24\) reach behind the last layer, 23"):
        DenseConnector.taps(dataclasses.replace(SCI, taps=(3, 24)), CLIP)


def test_only_sti_adds_tokens():
    model = tiny.config_of(STI)
    for vision, tokens in ((SIGLIP, 2 * 91), (CLIP, 2 * 72)):
        real = dataclasses.replace(model, vision=vision)
        assert DenseConnector.extras(STI, real) == Extras(pooled=tokens)
        assert DenseConnector.extras(SCI, real) == DenseConnector.extras(DCI, real) == NO_EXTRAS
    few = dataclasses.replace(SIGLIP, image_size=28)
    with pytest.raises(ValueError, match=f"pools {POOL} patches into a token, a tile has 4"):
        DenseConnector.extras(STI, dataclasses.replace(model, vision=few))


def looked(vision, scan_layers):
    """(params, pixels) -> two shares of all layers' states by `add`, and from the stack."""
    model = dataclasses.replace(
        tiny.model(DCI, scan_layers=scan_layers, remat="full"),
        config=dataclasses.replace(tiny.config_of(DCI), vision=vision),
    )
    last = vision.last_layer
    layers = tuple(range(last + 1))
    shares = jax.random.normal(jax.random.key(1), (len(layers), 2))

    def weighted(x, share):
        return {"both": jnp.stack([share[0] * x, share[1] * x])}

    def both(params, pixels):
        args = {"params": params}, pixels, layers, last
        total, top = model.apply(*args, weighted, shares, True, method="look")
        states, _ = model.apply(*args, lambda x, _: x, None, method="look")
        return total["both"], jnp.einsum("kc,kbpv->cbpv", shares, states), top, states[-1]

    return model, both


@pytest.mark.parametrize(("kind", "scan_layers"), [("siglip", True), ("clip", False)])
def test_sums_on_the_way_are_sums_of_the_states(kind, scan_layers):
    vision = dataclasses.replace(tiny.VISION, model_type=kind)
    model, both = looked(vision, scan_layers)
    batch = tiny.packed()
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) / 4), shapes)
    run = jax.jit(both, compiler_options=train_tiny.QUICK)
    total, expected, top, last = run(params, batch["pixel_values"])
    np.testing.assert_allclose(total, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(top, last)

    def gradient(part):
        def loss(params):
            return jnp.sum(jnp.sin(both(params, batch["pixel_values"])[part]))

        run = jax.jit(jax.grad(loss), compiler_options=train_tiny.QUICK)
        return run(params)["vision_tower"]

    found, wanted = gradient(0), gradient(1)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_means_keep_no_states():
    """Forward and backward: not the states of all layers, and not the sums after each of them."""
    m, batch = tiny.model(DCI, scan_layers=True, remat="full"), tiny.packed()
    V, n = tiny.VISION.hidden_size, tiny.VISION.num_hidden_layers
    B, patches = batch["plan_inverse"].shape[:2]

    def total(params):
        return jnp.sum(m.apply({"params": params}, batch).hidden)

    made = set(tiny.everything(jax.make_jaxpr(jax.grad(total))(tiny.redrawn(DCI)).jaxpr))
    assert (B, patches, 2 * V) in made  # the two means
    assert (n, B, patches, V) not in made
    assert (n, B, patches, 2 * V) not in made
