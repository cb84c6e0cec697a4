"""sli, layer_concat and mmfuser: layers, sizes, what they start as, and what is refused."""

import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cli_jax.config import ComputeConfig, ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.dryrun.bounds import bank_reads
from cli_jax.experiment import ConfigError, from_dict
from cli_jax.fusion.base import taps
from cli_jax.fusion.layer_concat import LayerConcat, LayerConcatConfig
from cli_jax.fusion.mmfuser import MMFuser, MMFuserConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.fusion.sli import SLI, SLIConfig
from cli_jax.model.vlm import build
from cli_jax.train.setup import make_setup
from configs import models
from tests.fusion import tiny
from tests.train import train_tiny

SIGLIP = VisionConfig()
CLIP = VisionConfig(**models.clip_l14_336())
QUICKSTART = VisionConfig(num_hidden_layers=3)
TEXT = TextConfig()


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "vision", "layers"),
    [
        (LayerConcat, CLIP, (3, 18, 23)),  # the paper's
        (LayerConcat, SIGLIP, (3, 20, 26)),
        (LayerConcat, QUICKSTART, (1, 2, 3)),
        (MMFuser, CLIP, (3, 8, 13, 18, 23)),  # the original's
        (MMFuser, SIGLIP, (3, 9, 15, 20, 26)),
        (MMFuser, QUICKSTART, (1, 2, 3)),
        (SLI, CLIP, (7, 14, 21, 23)),  # the last one is the input's
        (SLI, SIGLIP, (8, 16, 23, 26)),
        (SLI, QUICKSTART, (1, 2, 3)),
    ],
)
def test_default_layers(strategy, vision, layers):
    assert strategy.vision_layers(strategy.Config(), vision) == layers


def test_layers_by_shares_of_the_tower():
    assert taps("at:50%", SIGLIP) == ((13,),)
    assert taps("at:1%,2%,100%", SIGLIP) == ((1,), (26,))  # never the embeddings
    for spec in ("at:", "at:50", "at:60%,50%", "at:50%,50%", "at:0%", "at:101%", "at:5%,x%"):
        with pytest.raises(ValueError, match="does not name vision layers: use ascending shares"):
            taps(spec, SIGLIP)


def test_decoder_layers_of_sli():
    assert SLI.decoder_layers(SLIConfig(), TEXT) == (0, 1, 2)
    assert SLI.decoder_layers(SLIConfig(taps=(3, (8, 9)), start=22), TEXT) == (22, 23)
    for start, layers in ((22, r"22\.\.24"), (-1, r"-1\.\.1")):
        with pytest.raises(ValueError, match=rf"need the decoder layers {layers}: .* 0\.\.23"):
            SLI.decoder_layers(SLIConfig(start=start), TEXT)


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda: SLIConfig(taps="all"), "'all': every tap has its decoder layer, so name them"),
        (lambda: SLI.taps(SLIConfig(taps=(8, 3)), SIGLIP), r"\(8, 3\) do not ascend"),
        (
            lambda: SLI.taps(SLIConfig(taps="at:50%,60%,90%"), QUICKSTART),
            "are only 2 layers of this tower's 3: name fewer",
        ),
        (
            lambda: MMFuser.vision_layers(MMFuserConfig(layers=(5,)), SIGLIP),
            "layer 5 of this tower: name at least one shallower layer",
        ),
        (
            lambda: MMFuser.vision_layers(MMFuserConfig(heads=7), SIGLIP),
            "width 1152 is not divisible",
        ),
        (lambda: MMFuserConfig(points=0), r"fusion\.mmfuser\.points is 0: it must be >= 1"),
    ],
)
def test_refusals(find, message):
    with pytest.raises(ValueError, match=message):
        find()


def test_layers_of_concat_and_mmfuser_are_no_means():
    base = train_tiny.config()
    for name in ("layer_concat", "mmfuser"):
        base["fusion"] = {"name": name, name: {"layers": [1, [2, 3]]}}
        with pytest.raises(ConfigError, match=f"config.fusion.{name}.layers must be one of"):
            from_dict(base)


def test_a_run_says_in_one_line_what_is_wrong():
    for config, message in (
        ({"taps": (1,), "start": 7}, r"fusion.sli.start=7 and 1 taps need the decoder layers 7..7"),
        ({"taps": "all"}, "every tap has its decoder layer"),
        ({"taps": (9,)}, r"unknown vision layer \[9\]: this model has 0..1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_setup(train_tiny.experiment(fusion={"name": "sli", "sli": config}))


# ---- sizes ---------------------------------------------------------------------------------------


@functools.cache
def parameters(fusion, vision):
    """Shapes of a full-size model's parameters by path; nothing is computed."""
    text, image = TextConfig(hidden_size=4096, num_attention_heads=64), ImageConfig()
    model = ModelConfig(vision, text, image, tiny.name_of(fusion), fusion)
    m = build(model, ComputeConfig())
    batch = {
        name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in tiny.packed().items()
    }
    size, tiles, N = vision.image_size, tiny.SIZES["tiles"], vision.num_patches
    batch["pixel_values"] = jax.ShapeDtypeStruct((1, tiles, size, size, 3), np.uint8)
    batch["plan_inverse"] = jax.ShapeDtypeStruct((1, tiles * N, 4), np.int32)
    boxed = jax.eval_shape(m.init, jax.random.key(0), batch)["params"]
    return {p: x.shape for p, x in flatten_dict(nn.meta.unbox(boxed), sep="/").items()}


def added(fusion, vision):
    shapes = parameters(fusion, vision)
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("fusion/"))


def test_counts_at_full_size():
    assert added(MMFuserConfig(), CLIP) == 5_190_592  # the original's
    assert added(LayerConcatConfig(), CLIP) == 3 * 1024 * 4096 + 4096
    one = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert added(SLIConfig(), CLIP) == 3 * one
    with_p, without = parameters(SLIConfig(), CLIP), parameters(LayerConcatConfig(), CLIP)
    assert any(path.startswith("multi_modal_projector") for path in with_p)
    assert not any(path.startswith("multi_modal_projector") for path in without)


def test_mmfuser_has_the_originals_names():
    names = {path.split("/")[1] for path in parameters(MMFuserConfig(), CLIP) if "fusion" in path}
    norms = {"query_norm", "feat_norm", "norm1"}
    assert names == {"cross_attn", "self_attn", "gamma1", "gamma2", *norms}
    attn = [p.split("/", 2)[2] for p in parameters(MMFuserConfig(), CLIP) if "cross_attn" in p]
    linear = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    assert set(attn) == {f"{name}/{leaf}" for name in linear for leaf in ("kernel", "bias")}


def test_what_injections_read_of_the_bank():
    """Every point of cli reads all taps; the i-th of sli reads its own."""

    def taps_read(name, **config):
        base = train_tiny.config()
        base["fusion"] = {"name": name, name: config}
        base["model"]["vision"]["num_hidden_layers"] = 3
        base["model"]["text"]["num_hidden_layers"] = 4
        e = from_dict(base)
        one = e.data.visual_per_row * e.model.text.hidden_size * 4 * e.data.batch_size
        return bank_reads(e) / one / 2  # forward and backward

    assert taps_read("cli", taps=(1, 3), inject=(0, 1, 3)) == 6
    assert taps_read("sli", taps=(1, 2, 3)) == 3
    assert [taps_read(name) for name in ("none", "layer_concat", "mmfuser")] == [0, 0, 0]


# ---- the start -----------------------------------------------------------------------------------


def test_mmfuser_starts_as_none():
    """Bit for bit; with the gammas drawn it is another model."""
    config = MMFuserConfig(layers=(1, 2, 5), points=2)
    start, drawn = tiny.initial(config), tiny.redrawn(config)
    rng = np.random.default_rng(7)
    hidden = rng.normal(size=tiny.hidden_shape(config)).astype(np.float32)
    h = np.zeros((*tiny.packed()["input_ids"].shape, tiny.TEXT.hidden_size), np.float32)

    def features(fusion, params, hidden):
        m = tiny.model(fusion)
        run = jax.jit(
            lambda *args: m.apply({"params": args[0]}, *args[1:], method=tiny.fuse)[0],
            compiler_options=train_tiny.QUICK,
        )
        return np.asarray(run(params, hidden, tiny.packed(), h))

    base = features(NoneConfig(), tiny.without_fusion(start), hidden[-1:])
    np.testing.assert_array_equal(features(config, start, hidden), base)
    assert np.abs(features(config, drawn, hidden) - base).max() > 0.1
