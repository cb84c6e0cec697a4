"""AMP and AGF against the formulas of docs/method.md section 1, written out once more in numpy.

Both are given the same vision hidden states and the same residual stream h.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cli_jax.fusion.cli import CLI, CLIConfig, constant_gates
from cli_jax.fusion.none import NoneConfig
from tests.fusion import tiny
from tests.fusion.restatement import aligned, float64, injected, projected, sigmoid
from tests.fusion.rows import VISION

D = tiny.TEXT.hidden_size
TAPS, POINTS = (1, 3, 5), (0, 2)
CONFIG = CLIConfig(taps=TAPS, inject=POINTS, rank=4)
VARIANTS = {
    "scalar": CONFIG,
    "prompt": dataclasses.replace(CONFIG, context="prompt"),
    "per_pair": dataclasses.replace(CONFIG, per_pair=True),
    "channel": dataclasses.replace(CONFIG, gate="channel", gate_rank=3),
    "channel_per_pair_prompt": dataclasses.replace(
        CONFIG, gate="channel", gate_rank=3, per_pair=True, context="prompt"
    ),
    "alpha": dataclasses.replace(CONFIG, alpha=10.0),
    "amp_off": dataclasses.replace(CONFIG, amp=False),
    "mean": dataclasses.replace(CONFIG, agf="mean"),
    "one": dataclasses.replace(CONFIG, agf="one"),
    "taps_without_the_last": dataclasses.replace(CONFIG, taps=(0, 2), inject=(4,)),
    "mean_of_layers": dataclasses.replace(CONFIG, taps=((1, 3, 4), 2)),
}


@functools.cache
def compiled(config):
    """(params, hidden [E, B, M*N, V], h [B, L, D]) -> features, and (h, W) of every point."""
    m, batch = tiny.model(config), tiny.packed()
    run = jax.jit(
        lambda params, hidden, h: m.apply({"params": params}, hidden, batch, h, method=tiny.fuse)
    )
    return lambda *args: jax.tree.map(np.asarray, run(*args))


def draw(config):
    """Vision hidden states whose norms differ by layer, and a residual stream."""
    rng = np.random.default_rng(7)
    shape = tiny.hidden_shape(config)
    hidden = rng.normal(size=shape) * np.arange(1, shape[0] + 1).reshape(-1, 1, 1, 1) ** 2 / 4
    h = rng.normal(size=(*tiny.packed()["input_ids"].shape, D)) * 3
    return hidden.astype(np.float32), h.astype(np.float32)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_agrees_with_the_formulas(config):
    params, batch = tiny.redrawn(config), tiny.packed()
    hidden, h = draw(config)
    _, each = compiled(config)(params, hidden, h)
    layers = CLI.vision_layers(config, VISION)
    params, by_layer = float64(params), dict(zip(layers, float64(hidden), strict=True))
    Vhat = aligned(config, params, batch, by_layer)
    assert len(Vhat) == 5
    assert len(each) == len(config.inject)
    for t, (ours, W) in enumerate(each):
        wanted, gates = injected(config, params, batch, Vhat, t, float64(h))
        moved = np.abs(wanted - h).max()
        assert moved > 0.1
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-6 * max(moved, np.abs(h).max()))
        if config.agf == "gated":
            ours = np.array([W[pair] for pair in gates])
            assert len(ours) == 5 * len(config.taps)
            np.testing.assert_allclose(ours, list(gates.values()), rtol=0, atol=2e-6)
            assert np.ptp(ours) > 0.1  # the gates have something to disagree about
        else:
            assert W is None


def test_input_features_are_the_projected_last_layer():
    config = VARIANTS["taps_without_the_last"]
    hidden, h = draw(config)
    params = tiny.redrawn(config)
    features, _ = compiled(config)(params, hidden, h)
    batch, p64, last = tiny.packed(), float64(params), hidden[-1].astype(np.float64)
    patch = (batch["visual_image"] < 4) & ~batch["visual_newline"]
    for b, slot in np.argwhere(patch):
        wanted = projected(p64, batch, b, slot, last[b])
        np.testing.assert_allclose(features[b, slot], wanted, atol=2e-6 * np.abs(features).max())
    assert not features[~patch].any()  # newlines and padding get no bias


@pytest.mark.parametrize("layer", [2, 5])
def test_without_lora_b_the_bank_is_the_projection(layer):
    """B_k = 0 makes Vhat_k = P(V_k): what `none` puts at its input from the same layer."""
    config = dataclasses.replace(CONFIG, taps=(layer,), inject=(0,), agf="one")
    params = tiny.redrawn(config)
    lora = params["fusion"]["amp"]
    hidden, h = draw(config)
    (moved, _) = compiled(config)(params, hidden, 0 * h)[1][0]
    zero_b = {**params, "fusion": {"amp": {**lora, "lora_B": 0 * lora["lora_B"]}}}
    (ours, _) = compiled(config)(zero_b, hidden, 0 * h)[1][0]

    none = NoneConfig(vision_layer=layer)
    features, _ = compiled(none)(tiny.without_fusion(params), hidden[:1], h)
    batch = tiny.packed()
    patch = (batch["visual_image"] < 4) & ~batch["visual_newline"]
    for b, slot in np.argwhere(patch):
        np.testing.assert_array_equal(ours[b, batch["visual_position"][b, slot]], features[b, slot])
    assert np.abs(ours - moved).max() > 0.1  # and B_k does something


@pytest.mark.parametrize("name", ["prompt", "channel", "one"])
def test_only_visual_positions_are_injected(name):
    config = VARIANTS[name]
    hidden, h = draw(config)
    _, each = compiled(config)(tiny.redrawn(config), hidden, h)
    batch = tiny.packed()
    visual = np.zeros(batch["input_ids"].shape, bool)
    for b, slot in np.argwhere((batch["visual_image"] < 4) & ~batch["visual_newline"]):
        visual[b, batch["visual_position"][b, slot]] = True
    assert batch["visual_newline"].sum() == 12
    assert visual.sum() == 66
    for after, _ in each:
        np.testing.assert_array_equal(after[~visual], h[~visual])
        assert (after != h).any(-1)[visual].all()


@pytest.mark.parametrize("name", ["scalar", "channel_per_pair_prompt"])
def test_gates_start_at_the_bias_and_stay_between_zero_and_one(name):
    config = dataclasses.replace(VARIANTS[name], gate_bias_init=-1.5)
    hidden, h = draw(config)
    _, each = compiled(config)(tiny.initial(config), hidden, h)
    start = np.array([W for _, W in each])
    np.testing.assert_array_equal(start, start.flat[0])
    np.testing.assert_allclose(start.flat[0], sigmoid(-1.5), rtol=1e-6)
    _, each = compiled(config)(tiny.redrawn(config), hidden, h)
    W = np.array([W for _, W in each])
    assert 0 < W.min() < W.max() < 1


@pytest.mark.parametrize("name", ["scalar", "channel"])
def test_constant_gates_give_every_image_the_same(name):
    """The ablation "trained gates replaced by their data-set mean"."""
    trained = VARIANTS[name]
    rng = np.random.default_rng(3)
    mean = rng.uniform(0.1, 0.9, (len(POINTS), len(TAPS), *([D] if name == "channel" else [])))
    mean[0, 1] = 0
    mean[1, 2] = 1
    params = tiny.redrawn(trained)
    config, fusion = constant_gates(trained, params["fusion"], mean)
    hidden, h = draw(config)
    _, each = compiled(config)({**params, "fusion": fusion}, hidden, h)
    for t, (_, W) in enumerate(each):
        np.testing.assert_allclose(W, np.broadcast_to(mean[t], W.shape), rtol=0, atol=1e-6)
        assert (W[:, :, 1] == 0).all() if t == 0 else (W[:, :, 2] == 1).all()
    with pytest.raises(ValueError, match="only `gated`"):
        constant_gates(VARIANTS["one"], params["fusion"], mean)


def test_extreme_scores_keep_gradients_finite():
    """A position outside an image may score far above those inside it."""
    from cli_jax.fusion.agf import pool

    query, x = np.full((1, D), 500.0, np.float32), np.ones((1, 3, D), np.float32)
    x[0, 0] = -1
    member = np.array([[[True, False, False], [False, False, False]]])
    out, pull = jax.vjp(lambda q, x: pool(q, x, member), query, x)
    np.testing.assert_allclose(out[0, 0, 0], -1, rtol=1e-5)
    np.testing.assert_array_equal(out[0, 0, 1], 0)  # no members
    assert all(np.isfinite(g).all() for g in pull(np.ones_like(out)))
