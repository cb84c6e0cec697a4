"""The attention kernels against the plain one, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.model.attention import SHORT, attention, kernel_for, plain_attention
from cli_jax.model.kernels.cudnn import cudnn_attention
from cli_jax.model.kernels.splash import LANES, MAX_BLOCK, block_size, splash_attention

B, H, D = 2, 4, 64


def inputs(length, kv_heads, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    shapes = [(B, length, heads, D) for heads in (H, kv_heads, kv_heads, H)]
    q, k, v, out = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    cuts = np.sort(rng.integers(1, length, (B, 2)), axis=1)
    ids = 1 + sum(np.arange(length) >= cuts[:, i : i + 1] for i in range(2))
    ids[0, -length // 8 :] = 0  # padding at a row's end
    return q, k, v, out, jnp.asarray(ids, jnp.int32)


def value_and_gradients(f, q, k, v, cotangent):
    out, back = jax.vjp(f, q, k, v)
    return out, *back(cotangent.astype(out.dtype))


def compare(kernel, length, kv_heads, causal, segmented, dtype, tolerance):
    """Real positions and all gradients; what padding attends to is nobody's business."""
    q, k, v, cotangent, ids = inputs(length, kv_heads, dtype)
    segments = (ids, ids) if segmented else None
    real = (ids > 0 if segmented else jnp.ones_like(ids, bool))[..., None, None]
    cotangent = cotangent * real

    def plain(q, k, v):
        return plain_attention(q, k, v, segments=segments, causal=causal)

    def ours(q, k, v):
        return kernel(q, k, v, ids if segmented else None, causal=causal)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = value_and_gradients(plain, *exact, cotangent)
    got = value_and_gradients(ours, q, k, v, cotangent)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        if name == "out":
            a, b = a * np.asarray(real), b * np.asarray(real)
        assert np.abs(a - b).max() < tolerance * np.abs(b).max(), name


@pytest.mark.parametrize(
    ("length", "kv_heads", "causal", "segmented"),
    [
        (729, H, False, False),  # a tile's patches: padded to six blocks of 128
        (640, 2, True, True),  # a decoder row, grouped heads
        (200, 1, True, True),
        (256, 2, True, False),
    ],
)
def test_splash_equals_plain(length, kv_heads, causal, segmented):
    """In the interpreter: the same program, block by block, on the CPU."""

    def kernel(q, k, v, ids, causal):
        return splash_attention(q, k, v, ids, causal=causal, interpret=True)

    compare(kernel, length, kv_heads, causal, segmented, jnp.float32, 2e-5)


@pytest.mark.parametrize(
    ("length", "kv_heads", "causal", "segmented"),
    [(729, H, False, False), (201, 2, True, True), (201, 1, True, False), (640, 2, True, True)],
)
def test_what_cudnn_is_given_equals_plain(monkeypatch, length, kv_heads, causal, segmented):
    """Masks, padding and lengths, with XLA in cuDNN's place: no GPU is needed."""
    real, lengths = jax.nn.dot_product_attention, []

    def in_xla(q, *args, implementation, **how):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return real(q, *args, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    compare(cudnn_attention, length, kv_heads, causal, segmented, jnp.float32, 2e-5)
    assert lengths == [length + length % 2]


@pytest.mark.parametrize("segmented", [True, False])
def test_jax_takes_gradients_of_odd_lengths_through_cudnn(monkeypatch, segmented):
    """Traced only, with the look-ups of the GPU's library answered: 729 is SigLIP's tile."""
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 91_100)
    monkeypatch.setattr(f"{library}.check_compute_capability", lambda _: True)
    q, k, v, cotangent, ids = inputs(729, 2, jnp.bfloat16)

    def attend(q, k, v):
        return cudnn_attention(q, k, v, ids if segmented else None, causal=segmented)

    both = functools.partial(value_and_gradients, attend)
    traced = jax.eval_shape(both, q, k, v, cotangent)
    assert [x.shape for x in traced] == [x.shape for x in (q, q, k, v)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("length", "kv_heads", "causal"), [(729, H, False), (640, 2, True), (641, 2, True)]
)
def test_cudnn_equals_plain(length, kv_heads, causal):
    compare(cudnn_attention, length, kv_heads, causal, causal, jnp.bfloat16, 3e-2)


@pytest.mark.gpu
def test_cudnn_grows_with_the_length_not_its_square():
    """No [heads, L, L] array of scores: temporaries are a few rows' worth and the mask."""
    q, k, v, cotangent, ids = inputs(4096, 2, jnp.bfloat16)

    def both(q, k, v, cotangent):
        f = lambda *x: attention(  # noqa: E731
            *x, ids, causal=True, heads=("heads", "kv_heads"), kernel="cudnn"
        )
        return value_and_gradients(f, q, k, v, cotangent)

    found = jax.jit(both).lower(q, k, v, cotangent).compile().memory_analysis()
    assert found.temp_size_in_bytes < B * H * 4096 * 4096 * 2


def test_blocks_divide_whole_lanes():
    for lanes in range(1, 90):
        block = block_size(lanes * LANES)
        assert block % LANES == 0
        assert (lanes * LANES) % block == 0
        assert block <= MAX_BLOCK
    assert block_size(10_240) == MAX_BLOCK


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "kernel"),
    [
        ("auto", "tpu", "float32", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),  # cuDNN's knows 16 bits only
        ("auto", "cpu", "bfloat16", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("splash", "cpu", "float32", "splash"),
    ],
)
def test_auto_is_settled_by_platform_and_dtype(name, platform, dtype, kernel):
    assert kernel_for(name, platform, dtype) == kernel


def test_short_rows_use_the_plain_form():
    """A kernel that cannot run here is not asked."""
    q, k, v, _, ids = inputs(SHORT - 1, 2)
    got = attention(q, k, v, ids, causal=True, heads=("heads", "kv_heads"), kernel="splash")
    expected = plain_attention(q, k, v, segments=(ids, ids), causal=True)
    np.testing.assert_array_equal(got, expected)
