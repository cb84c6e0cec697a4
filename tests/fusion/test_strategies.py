"""What holds for every fusion strategy, whatever it computes.

What a strategy computes is tested beside its name (`test_formulas.py`, `test_sli.py`, ...).
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType

from cli_jax.batch import IGNORE
from cli_jax.experiment import from_dict, to_dict
from cli_jax.fusion import registry
from cli_jax.parallel.mesh import AXES
from cli_jax.parallel.rules import Rules, shard_params
from tests.fusion import tiny
from tests.fusion.restatement import pictures
from tests.fusion.rows import VISION, VOCAB, make_batch
from tests.fusion.strategies import ENTRIES, every_strategy
from tests.train import train_tiny

QUICK = train_tiny.QUICK


def strategy_of(entry):
    return registry.get(tiny.name_of(entry.config))


@functools.cache
def forward(config, **compute):
    """Compiled (params, batch) -> (logits [B, L, vocab], gates or None), compiled quickly."""
    return tiny.forward(config, options=tuple(QUICK.items()), **compute)


@functools.cache
def result(config):
    """What the packed batch gives."""
    return forward(config)(tiny.redrawn(config), tiny.packed(config))


@functools.cache
def fuse(config):
    """Compiled (hidden [E, B, M*N, V], h [B, L, D]) -> features, and (h, out) of every point."""
    m, params, batch = tiny.model(config), tiny.redrawn(config), tiny.packed(config)

    def run(hidden, h):
        return m.apply({"params": params}, hidden, batch, h, method=tiny.fuse)

    compiled = jax.jit(run, compiler_options=QUICK)
    return lambda *args: jax.tree.map(np.asarray, compiled(*args))


def draw(config):
    rng = np.random.default_rng(7)
    hidden = rng.normal(size=tiny.hidden_shape(config)).astype(np.float32)
    h = rng.normal(size=(*tiny.packed(config)["input_ids"].shape, tiny.TEXT.hidden_size))
    return hidden, h.astype(np.float32)


def patch_slots(batch):
    """bool [B, P]: slots of image patches."""
    return (batch["visual_image"] < batch["image_segment"].shape[1]) & ~batch["visual_newline"]


def test_no_strategy_is_left_out():
    assert {tiny.name_of(entry.config) for entry in ENTRIES.values()} == set(registry.STRATEGIES)


# ---- declarations --------------------------------------------------------------------------------


@every_strategy
def test_declared_layers_are_the_ones_used(entry):
    """The declared vision layers are all that the strategy looks at; points are as declared."""
    config, cls = entry.config, strategy_of(entry)
    layers = cls.vision_layers(config, VISION)
    assert layers == tuple(sorted(set(layers)))
    points = cls.decoder_layers(config, tiny.TEXT)
    features, each = fuse(config)(*draw(config))  # a layer that is not declared raises
    assert len(each) == len(points)
    hidden, h = draw(config)
    for e in range(len(layers)):  # and every declared one is used
        other = hidden.copy()
        other[e] += 1
        moved, each_moved = fuse(config)(other, h)
        outs = zip(each, each_moved, strict=True)
        assert (moved != features).any() or any((a[0] != b[0]).any() for a, b in outs)


@every_strategy
def test_a_strategy_says_whether_the_projector_is_a_plain_one(entry):
    """None, or one of several layers, is not: a checkpoint's does not fit."""
    projector = tiny.redrawn(entry.config).get("multi_modal_projector")
    plain = projector is not None and len(projector["linear_1"]["kernel"]) == VISION.hidden_size
    assert strategy_of(entry).has_plain_projector(entry.config) == plain


@every_strategy
def test_config_survives_json(entry):
    name = tiny.name_of(entry.config)
    base = train_tiny.config()
    base["fusion"] = {"name": name, name: dataclasses.asdict(entry.config)}
    for part in ("vision", "text", "image"):
        base["model"][part] = dataclasses.asdict(getattr(tiny.config_of(entry.config), part))
    experiment = from_dict(base)
    assert experiment.model.fusion == entry.config
    assert from_dict(to_dict(experiment)) == experiment


@every_strategy
def test_parameters_can_be_split_over_every_mesh_axis(entry):
    m = tiny.model(entry.config)
    boxed = jax.eval_shape(lambda: m.init(jax.random.key(0), tiny.packed(entry.config))["params"])
    leaves = flatten_dict(boxed.get("fusion", {}), sep="/")
    assert all(isinstance(leaf, nn.Partitioned) for leaf in leaves.values()), leaves
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    placed, _ = shard_params(boxed, mesh, Rules())
    for path, leaf in flatten_dict(placed.get("fusion", {}), sep="/").items():
        if leaf.ndim > 1 and min(leaf.shape[-2:]) >= tiny.VISION.hidden_size:
            assert "fsdp" in leaf.sharding.spec, f"{path} {leaf.shape} is whole on every device"


# ---- what changes, and what depends on what: one executable, every other bit equal --------------


@every_strategy
def test_only_positions_of_patches_change(entry):
    hidden, h = draw(entry.config)
    features, each = fuse(entry.config)(hidden, h)
    batch = tiny.packed(entry.config)
    patch = patch_slots(batch)
    assert not features[~patch].any()  # newlines and padding get nothing, not even a bias
    assert features[patch].any(-1).all()
    visual = np.zeros(h.shape[:2], bool)
    for b, slot in np.argwhere(patch):
        visual[b, batch["visual_position"][b, slot]] = True
    for after, _ in each:
        np.testing.assert_array_equal(after[~visual], h[~visual])
        assert (after != h)[visual].any()


@every_strategy
def test_no_logit_depends_on_a_later_token(entry):
    """Every text token in turn, in several turns, pictures and packed rows.

    Where a picture sees its question, a question's tokens reach back; answers never do.
    """
    config, batch = entry.config, tiny.packed(entry.config)
    params, (logits, _) = tiny.redrawn(config), result(config)
    moved = (batch["segment_ids"] > 0) & (batch["visual_index"] == len(batch["visual_image"][0]))
    if strategy_of(entry).needs_prompt_context(config):
        moved &= batch["labels"] != IGNORE
    for position in np.flatnonzero(moved.any(0)):
        rows = np.flatnonzero(moved[:, position])
        ids = batch["input_ids"].copy()
        ids[rows, position] = ids[rows, position] % (VOCAB - 1) + 1
        differs = (forward(config)(params, {**batch, "input_ids": ids})[0] != logits).any(-1)
        assert not differs[:, :position].any()
        assert differs[rows, position].all()
    assert moved.sum() >= 17


@every_strategy
def test_samples_and_rows_never_mix(entry):
    """A picture's pixels reach its own sample only, and nothing before it.

    But where pictures see their questions, which may see other pictures.
    """
    config, batch = entry.config, tiny.packed(entry.config)
    params, (logits, _) = tiny.redrawn(config), result(config)
    sees_questions = strategy_of(entry).needs_prompt_context(config)
    for b, i in pictures(batch):
        slots = batch["visual_image"][b] == i
        tiles = tiny.tiles_of(batch, b, i)
        pixels = batch["pixel_values"].copy()
        pixels[b, tiles] = 255 - pixels[b, tiles]
        differs = forward(config)(params, {**batch, "pixel_values": pixels})[0] != logits
        differs = differs.any(-1)
        sample = batch["segment_ids"][b] == batch["image_segment"][b, i]
        assert not differs[1 - b].any()
        assert not differs[b, ~sample].any()
        assert differs[b, sample].any()
        assert sees_questions or not differs[b, : batch["visual_position"][b][slots].min()].any()


@every_strategy
def test_pictures_never_mix(entry):
    """Other hidden states of one picture's tiles change what other pictures get in no bit."""
    config, batch, N = entry.config, tiny.packed(entry.config), VISION.num_patches
    hidden, h = draw(config)
    features, each = fuse(config)(hidden, h)
    for b, i in pictures(batch):
        own = batch["visual_image"] == i
        own[1 - b] = False
        other = hidden.copy().reshape(*hidden.shape[:2], -1, N, hidden.shape[-1])
        other[:, b, tiny.tiles_of(batch, b, i)] += 1
        moved, each_moved = fuse(config)(other.reshape(hidden.shape), h)
        np.testing.assert_array_equal(moved[~own], features[~own])
        assert (moved != features)[own].any()
        places = np.zeros(h.shape[:2], bool)
        places[b, batch["visual_position"][own]] = True
        reached = []
        for (after, _), (after_moved, _) in zip(each, each_moved, strict=True):
            np.testing.assert_array_equal(after_moved[~places], after[~places])
            reached.append((after_moved != after)[places].any())
        # A picture of two more tiles has two stacks; an adapter is told of no picture.
        every = len(reached)
        counts = {"deepstack": (2, every), "adapter": (0,)}
        assert sum(reached) in counts.get(tiny.name_of(config), (every,))


@every_strategy
def test_nothing_scatters(entry):
    """Backward passes gather, too: nothing depends on the order of a scatter's additions."""
    m, batch = tiny.model(entry.config), tiny.packed(entry.config)

    def total(params, hidden, h):
        made = m.apply({"params": params}, hidden, batch, h, method=tiny.fuse)
        return sum(jnp.sum(x) for x in jax.tree.leaves(made))  # the gates, too

    traced = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(
        tiny.redrawn(entry.config), *draw(entry.config)
    )
    assert "scatter" not in str(traced)
    assert "gather" in str(traced)


# ---- equal results -------------------------------------------------------------------------------


@every_strategy
def test_scanned_equals_unrolled(entry):
    """Layers in a scan and rematerialized, or one after another."""
    config = entry.config
    logits, gates = forward(config, scan_layers=False)(tiny.redrawn(config), tiny.packed(config))
    scanned, scanned_gates = result(config)
    np.testing.assert_allclose(scanned, logits, rtol=0, atol=2e-6 * logits.std())
    if gates is not None:
        np.testing.assert_allclose(scanned_gates, gates, rtol=0, atol=1e-6)


@every_strategy
def test_packed_equals_unpacked(entry):
    """A sample's logits do not depend on its neighbors nor on its place in the row."""
    config = entry.config
    params, (packed, _) = tiny.redrawn(config), result(config)
    extras = tiny.extras_of(config)
    (first, second, third), pair = tiny.conversations(extras)
    scale, at = 1e-5 * packed.std(), 0
    for rows in ([[first], [second]], [[third], pair]):
        alone, _ = forward(config)(params, make_batch(rows, **tiny.sizes(extras)))
        for (sample,), logits in zip(rows, alone, strict=True):
            length = len(sample.ids)
            b, start = (1, 0) if sample is pair[0] else (0, at)
            there = packed[b, start : start + length]
            np.testing.assert_allclose(there, logits[:length], rtol=0, atol=scale)
            at += length


@every_strategy
def test_a_batch_of_one_equals_a_larger_one(entry):
    config = entry.config
    params, (logits, _) = tiny.redrawn(config), result(config)
    for b, alone in enumerate(logits):
        row = {name: x[b : b + 1] for name, x in tiny.packed(config).items()}
        one, _ = forward(config)(params, row)
        np.testing.assert_allclose(one[0], alone, rtol=0, atol=3e-6 * logits.std())


# ---- gradients -----------------------------------------------------------------------------------


@every_strategy
def test_gradients_are_finite_and_only_the_declared_ones_start_at_zero(entry):
    """Afterwards none is zero, in no tap and no point."""
    config, batch = entry.config, tiny.packed(entry.config)
    m = tiny.model(config, remat="full")
    parts = ("fusion", "multi_modal_projector")

    def loss(own, rest):
        params = {**own, **rest}
        hidden = m.apply({"params": params}, batch).hidden
        log_p = jax.nn.log_softmax(m.apply({"params": params}, hidden, method="logits"))
        targets = batch["labels"][:, 1:]
        picked = jnp.take_along_axis(log_p[:, :-1], targets[..., None], 2, mode="clip")
        return -jnp.mean(picked[..., 0], where=targets != IGNORE)

    grad = jax.jit(jax.grad(loss), compiler_options=QUICK)

    def gradients(params):
        own = {part: params[part] for part in parts if part in params}
        rest = {part: params[part] for part in params if part not in parts}
        return flatten_dict(grad(own, rest), sep="/")

    start, later = gradients(tiny.initial(config)), gradients(tiny.redrawn(config))
    declared = {path for path in start if re.fullmatch(f"fusion/({entry.without_gradient})", path)}
    assert {path for path, g in start.items() if not g.any()} == declared
    for found in (start, later):
        for path, g in found.items():
            assert np.isfinite(g).all(), path
            if found is later or path not in declared:
                assert np.abs(g).reshape(len(g), -1).max(1).all(), path
