"""Cross-Layer Injection inside the whole model: its values, and what may depend on what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.batch import IGNORE
from cli_jax.fusion.cli import CLIConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.model.attention import plain_attention
from cli_jax.model.decoder import DecoderLayer
from cli_jax.model.layers import rotary_angles
from tests.fusion import tiny
from tests.fusion.restatement import aligned, float64, injected, patch_slots, pictures, projected
from tests.fusion.rows import VISION, VOCAB, make_batch

IMAGE = CLIConfig(taps=(1, 3, 5), inject=(0, 1, 3), rank=4)
PROMPT = CLIConfig(taps=(0, 4), inject=(2, 4), rank=4, context="prompt")
DENSE = CLIConfig(taps=(1, 2, 3, 4, 5), inject=(0, 1, 2, 3, 4), rank=4, per_pair=True)
CONTEXTS = pytest.mark.parametrize("config", [IMAGE, PROMPT], ids=["image", "prompt"])


# ---- values --------------------------------------------------------------------------------------


@functools.cache
def pieces():
    """Compiled parts of the model without fusion: tower, one decoder layer, norm and head."""
    m, c, batch = tiny.model(NoneConfig()), tiny.TEXT, tiny.packed()
    block = DecoderLayer(c, jnp.dtype("float32"), jnp.dtype("float32"))

    def attend(q, k, v, cache, layer):
        segments = batch["segment_ids"], batch["segment_ids"]
        return plain_attention(q, k, v, segments=segments, causal=True), cache

    @jax.jit
    def tower(params):
        layers = tuple(range(VISION.last_layer + 1))
        return m.apply({"params": params}, batch["pixel_values"], layers, method="vision")

    @jax.jit
    def layer(weights, h):
        rotary = rotary_angles(batch["positions"], c.head_dim, c.rope_theta, h.dtype)
        return block.apply({"params": weights}, h, rotary, attend, None, 0)[0]

    @jax.jit
    def head(params, h):
        def finish(m, h):
            return m.logits(m.language_model.norm(h))

        return m.apply({"params": params}, h, method=finish)

    return tower, layer, head


def reference(config, params):
    """Logits and gates by a loop over decoder layers: inject before the layer, then run it."""
    tower, layer, head = pieces()
    batch, base, wide = tiny.packed(), tiny.without_fusion(params), float64(params)
    hidden = float64(tower(base))
    language = params["language_model"]
    h = language["embed_tokens"]["embedding"][batch["input_ids"]].astype(np.float64)
    for b, slot in np.argwhere(batch["visual_newline"]):
        h[b, batch["visual_position"][b, slot]] = params["image_newline"]
    for b, i in pictures(batch):
        for slot in patch_slots(batch, b, i):
            feature = projected(wide, batch, b, slot, hidden[-1][b])
            h[b, batch["visual_position"][b, slot]] = feature
    Vhat, gates = aligned(config, wide, batch, hidden), {}
    for n in range(tiny.TEXT.num_hidden_layers):
        if n in config.inject:
            t = config.inject.index(n)
            h, W = injected(config, wide, batch, Vhat, t, h)
            gates |= {(t, *pair): gate for pair, gate in W.items()}
        h = float64(layer(jax.tree.map(lambda x, n=n: x[n], language["layers"]), np.float32(h)))
    return np.asarray(head(base, np.float32(h))), gates


@pytest.mark.parametrize(
    ("config", "scan_layers"),
    [(IMAGE, True), (IMAGE, False), (PROMPT, True), (DENSE, True)],
    ids=["image", "image_unrolled", "prompt", "dense"],
)
def test_equals_a_loop_over_layers(config, scan_layers):
    """Injection acts on the stream that enters the layer, at any spacing, scanned or unrolled."""
    params = tiny.redrawn(config)
    logits, W = tiny.forward(config, scan_layers=scan_layers)(params, tiny.packed())
    expected, gates = reference(config, params)
    real = tiny.packed()["segment_ids"] > 0
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=1e-5 * expected.std())
    assert W.shape == (len(config.inject), 2, 4, len(config.taps))
    np.testing.assert_allclose([W[at] for at in gates], list(gates.values()), rtol=0, atol=1e-5)


def test_packed_equals_unpacked():
    """A sample's logits do not depend on its neighbors nor on its place in the row."""
    forward, params = tiny.forward(IMAGE), tiny.redrawn(IMAGE)
    first, second = tiny.conversations()
    packed, W = forward(params, tiny.packed())
    alone, at = [], 0
    for rows in ([[first[0]], [first[1]]], [[first[2]], second]):
        logits, gates = forward(params, make_batch(rows, **tiny.SIZES))
        alone += zip(rows, logits, np.moveaxis(gates, 1, 0), strict=True)
    image = 0
    for (sample,), logits, gates in alone[:3]:
        length, count = len(sample.ids), len(sample.pictures)
        scale = 1e-5 * packed.std()
        np.testing.assert_allclose(packed[0, at : at + length], logits[:length], rtol=0, atol=scale)
        np.testing.assert_allclose(W[:, 0, image : image + count], gates[:, :count], atol=1e-6)
        at, image = at + length, image + count
    assert image == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "unroll"])
def test_gates_of_zero_give_the_base_model_bit_for_bit(dtype, scan_layers):
    compute = {"dtype": dtype, "scan_layers": scan_layers}
    params = tiny.with_fusion(tiny.redrawn(IMAGE), gate_bias=-1e9)
    logits, W = tiny.forward(IMAGE, **compute)(params, tiny.packed())
    assert (W == 0).all()
    base, _ = tiny.forward(NoneConfig(), **compute)(tiny.without_fusion(params), tiny.packed())
    np.testing.assert_array_equal(logits, base)
    open_gates, _ = tiny.forward(IMAGE, **compute)(tiny.redrawn(IMAGE), tiny.packed())
    assert np.abs(open_gates - base).max() > 0.1


# ---- what depends on what: one executable, one thing changed, every other bit equal --------------


def spans(batch):
    """(row, image, segment, first position, e_i) of every picture."""
    for b, i in pictures(batch):
        start = batch["visual_position"][b][batch["visual_image"][b] == i].min()
        yield b, i, batch["image_segment"][b, i], start, batch["context_end"][b, i]


@CONTEXTS
def test_no_logit_depends_on_a_later_token(config):
    """Every text token in turn; multi-turn, multi-image and packed rows are among them.

    With the `prompt` context a question token reaches back to its sample's pictures whose answer
    has not begun, and no further; from the first answer token on nothing reaches back.
    """
    forward, params, batch = tiny.forward(config), tiny.redrawn(config), tiny.packed()
    logits, _ = forward(params, batch)
    text = (batch["segment_ids"] > 0) & (batch["visual_index"] == tiny.SIZES["visual"])
    reached_back = 0
    for position in range(tiny.SIZES["length"]):
        rows = np.flatnonzero(text[:, position])
        ids = batch["input_ids"].copy()
        ids[rows, position] = ids[rows, position] % (VOCAB - 1) + 1
        differs = (forward(params, {**batch, "input_ids": ids})[0] != logits).any(-1)
        for b in rows:
            first = position
            if config.context == "prompt":
                own = b, batch["segment_ids"][b, position]
                waiting = [
                    start
                    for b, _, s, start, end in spans(batch)
                    if (b, s) == own and position < end
                ]
                first = min([position, *waiting])
            if batch["labels"][b, position] != IGNORE:
                assert first == position
            assert not differs[b, :first].any()
            assert differs[b, position]
            reached_back += differs[b, :position].any()
    questions_with_pictures = 4 + 3 + 3 + 5  # their tokens, in the four turns that have pictures
    assert reached_back == (questions_with_pictures if config.context == "prompt" else 0)


@CONTEXTS
def test_pictures_never_mix(config):
    """A picture's pixels reach its own sample only, and no other picture's pools."""
    forward, params, batch = tiny.forward(config), tiny.redrawn(config), tiny.packed()
    logits, W = forward(params, batch)
    N = VISION.num_patches
    for b, i, segment, start, _ in spans(batch):
        slots = batch["visual_image"][b] == i
        tiles = np.unique(batch["plan_index"][b, slots][batch["plan_weight"][b, slots] > 0] // N)
        pixels = batch["pixel_values"].copy()
        pixels[b, tiles] = 255 - pixels[b, tiles]
        new_logits, new_W = forward(params, {**batch, "pixel_values": pixels})
        differs = (new_logits != logits).any(-1)
        sample = batch["segment_ids"][b] == segment
        assert not differs[1 - b].any()
        assert not differs[b, ~sample].any()
        assert differs[b, sample].any()
        elsewhere = batch["image_segment"][b] != segment
        np.testing.assert_array_equal(new_W[:, 1 - b], W[:, 1 - b])
        np.testing.assert_array_equal(new_W[:, b, elsewhere], W[:, b, elsewhere])
        assert (new_W[:, b, i] != W[:, b, i]).all()
        if config.context == "image":
            assert not differs[b, :start].any()
            others = np.arange(4) != i
            # At decoder layer 0 no attention has happened yet: only own patches count.
            np.testing.assert_array_equal(new_W[0, b, others], W[0, b, others])
