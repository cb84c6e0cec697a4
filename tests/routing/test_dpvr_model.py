"""DPVR inside the whole model: its values against masks, and what may depend on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli_jax.fusion.cli import CLIConfig
from cli_jax.model.attention import plain_attention
from tests.fusion import tiny
from tests.fusion.restatement import pictures
from tests.fusion.rows import VISION, VOCAB, make_batch
from tests.routing import dpvr_case as case
from tests.train.train_tiny import QUICK

EARLY = CLIConfig(taps=(1, 3, 5), inject=(0, 1), rank=4)
LAST = tiny.TEXT.num_hidden_layers - 1


def close(ours, theirs, bound=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * theirs.std())


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saturation", "fusion", "scan_layers"),
    [
        (2, case.PLAIN, True),
        (2, case.PLAIN, False),
        (1, case.PLAIN, True),
        (LAST, case.PLAIN, True),
        (2, EARLY, True),
    ],
    ids=["scanned", "looped", "first", "last", "cli"],
)
def test_equals_whole_rows_with_masks(saturation, fusion, scan_layers):
    """Several samples a row, several pictures a sample, newlines, samples without pictures."""
    params, batch = case.redrawn(fusion), case.packed()
    logits = case.forward(saturation, fusion, scan_layers)(params, batch)
    expected = case.reference(saturation, params, batch, fusion)
    text = case.is_text(batch)
    assert text.sum() > 30
    close(logits[text], expected[text])


def test_scanned_equals_looped():
    scanned, looped = (
        case.forward(scan_layers=scan)(case.redrawn(), case.packed()) for scan in (True, False)
    )
    close(scanned, looped, 2e-6)


@pytest.mark.parametrize("fusion", [case.PLAIN, EARLY], ids=["none", "cli"])
def test_the_last_layer_behind_an_idle_branch_is_the_ordinary_decoder(fusion):
    params, batch = case.identity_side(case.redrawn(fusion)), case.packed()
    logits = case.forward(LAST, fusion)(params, batch)
    plain = {name: leaf for name, leaf in params.items() if name != "routing"}
    ordinary, _ = tiny.forward(fusion)(plain, tiny.packed())
    text = case.is_text(batch)
    close(logits[text], ordinary[text], 4e-6)
    busy = case.forward(LAST, fusion)(case.redrawn(fusion), batch)
    assert np.abs(busy - logits)[text].max() > 0.1


def test_packed_equals_unpacked():
    forward, params = case.forward(), case.redrawn()
    first, second = tiny.conversations()
    packed, at = forward(params, case.packed()), 0
    for rows in ([[first[0]], [first[1]]], [[first[2]], second]):
        batch = case.with_text(make_batch(rows, **tiny.SIZES))
        logits, text = forward(params, batch), case.is_text(batch)
        for b, samples in enumerate(rows):
            length = sum(len(sample.ids) for sample in samples)
            row, start = (1, 0) if samples is second else (0, at)
            own = text[b, :length]
            close(logits[b, :length][own], packed[row, start : start + length][own])
            at += length if row == 0 else 0


def test_dense_states_stand_where_they_say():
    m, batch = case.model(), case.packed()
    out = jax.jit(m.apply, compiler_options=QUICK)({"params": case.redrawn()}, batch)
    text = case.is_text(batch)
    for b in range(2):
        places = out.scored.position[b][: text[b].sum()]
        assert places.tolist() == np.flatnonzero(text[b]).tolist()
        np.testing.assert_array_equal(out.hidden[b, places], out.scored.hidden[b, : len(places)])
    assert not np.asarray(out.hidden)[~text].any()


# ---- what depends on what: one executable, one thing changed, every other bit equal --------------


def test_no_logit_depends_on_a_later_token():
    forward, params, batch = case.forward(), case.redrawn(), case.packed()
    logits, text = forward(params, batch), case.is_text(batch)
    for position in range(tiny.SIZES["length"]):
        rows = np.flatnonzero(text[:, position])
        ids = batch["input_ids"].copy()
        ids[rows, position] = ids[rows, position] % (VOCAB - 1) + 1
        differs = (forward(params, {**batch, "input_ids": ids}) != logits).any(-1)
        for b in rows:
            other = batch["segment_ids"][b] != batch["segment_ids"][b, position]
            assert not differs[b, :position].any()
            assert not differs[b, other].any()
            assert differs[b, position]


def test_a_picture_reaches_the_text_behind_it_and_nothing_else():
    forward, params, batch = case.forward(), case.redrawn(), case.packed()
    logits, text = forward(params, batch), case.is_text(batch)
    N = VISION.num_patches
    for b, i in pictures(batch):
        slots = batch["visual_image"][b] == i
        tiles = np.unique(batch["plan_index"][b, slots][batch["plan_weight"][b, slots] > 0] // N)
        pixels = batch["pixel_values"].copy()
        pixels[b, tiles] = 255 - pixels[b, tiles]
        differs = (forward(params, {**batch, "pixel_values": pixels}) != logits).any(-1)
        start = batch["visual_position"][b][slots].min()
        behind = text[b] & (batch["segment_ids"][b] == batch["image_segment"][b, i])
        behind &= np.arange(len(behind)) > start
        assert not differs[1 - b].any()
        assert (differs[b] == behind).all()


def test_vision_reaches_text_through_the_side_branch():
    """At s = 1 the branch's weights reach text behind pictures, and no text without pictures."""
    forward, batch = case.forward(1), case.packed()
    logits = forward(case.redrawn(), batch)
    differs = (forward(case.identity_side(case.redrawn()), batch) != logits).any(-1)
    text = case.is_text(batch)
    seen = np.zeros_like(text)
    for b, i in pictures(batch):
        own = batch["segment_ids"][b] == batch["image_segment"][b, i]
        start = batch["visual_position"][b][batch["visual_image"][b] == i].min()
        seen[b] |= own & text[b] & (np.arange(text.shape[1]) > start)
    assert (differs == seen).all()
    assert (text & ~seen).any()


# ---- parts ---------------------------------------------------------------------------------------


def test_the_branch_learns_from_the_first_step_on():
    """As a copy of layer s; with rematerialization the gradient is the same."""
    batch, drawn = case.packed(), case.redrawn()
    copy = jax.tree.map(lambda x: jnp.asarray(x[2]), drawn["language_model"]["layers"])

    def gradient(remat):
        m = case.model(remat=remat)

        def of(side):
            params = {**drawn, "routing": {"side_branch": side}}
            return jnp.sum(jnp.sin(m.apply({"params": params}, batch).scored.hidden))

        return flatten_dict(jax.jit(jax.grad(of), compiler_options=QUICK)(copy), sep="/")

    kept, repeated = gradient("none"), gradient("full")
    assert len(kept) == 12
    for name, g in kept.items():
        assert np.isfinite(g).all()
        assert np.abs(g).max() > 1e-4, name
        np.testing.assert_allclose(repeated[name], g, rtol=1e-4, atol=1e-5)


def test_attention_by_places():
    """Rows in another order, with their places, attend as in order."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 9, 4, 8)).astype(np.float32)
    segment = np.sort(rng.integers(1, 3, (2, 9)))
    ordered = plain_attention(q, k, v, segments=(segment, segment), causal=True)
    mixed, some = rng.permutation(9), np.array([7, 1, 4])
    places = (np.tile(some, (2, 1)), np.tile(mixed, (2, 1)))
    out = plain_attention(
        q[:, some], k[:, mixed], v[:, mixed],
        segments=(segment[:, some], segment[:, mixed]), causal=True, places=places,
    )  # fmt: skip
    np.testing.assert_allclose(out, ordered[:, some], rtol=1e-5, atol=1e-6)
