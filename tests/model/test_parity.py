"""Logits and hidden states equal transformers' in float32, for every kind of sample.

The bound is 1e-5 standard deviations of what is compared. Reached on XLA:CPU: at most 4e-6 for
logits; two float32 programs that sum in different orders cannot be much closer.
"""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from cli_jax.image.preprocess import normalize
from cli_jax.model.vision import normalize as normalize_on_device
from cli_jax.model.vlm import build
from tests.model import oracle
from tests.model.samples import batch_of, layouts

VARIANTS = {
    "scan-full": oracle.SCANNED,
    "loop-none": oracle.LOOPED,
    "scan-none": dataclasses.replace(oracle.SCANNED, remat="none"),
    "loop-full": dataclasses.replace(oracle.LOOPED, remat="full"),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("siglip_qwen2", variant) for variant in VARIANTS),
        ("siglip_qwen2_tied", "scan-full"),
        ("clip_llama", "scan-full"),
        ("clip_llama", "loop-none"),
    ],
)
def test_logits_at_every_position(name, variant):
    errors = oracle.logit_errors(name, VARIANTS[variant])
    assert len(errors) == 18  # prompts alone and packed
    assert {place: e for place, e in errors.items() if not e <= oracle.BOUND} == {}


@pytest.mark.parametrize("compute", [oracle.SCANNED, oracle.LOOPED], ids=["scan", "loop"])
@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_llama"])
def test_hidden_states_of_every_vision_layer(name, compute):
    errors = oracle.hidden_state_errors(name, compute)
    assert len(errors) == oracle.CONFIGS[name].vision.num_hidden_layers + 1
    assert max(errors) <= oracle.BOUND, errors


def test_the_layer_that_feeds_the_projector_is_the_references():
    # Not implied by the above: there every layer is asked for by its own number.
    for name, layer in (("siglip_qwen2", -1), ("clip_llama", -2)):
        case = oracle.case(name)
        states = range(case.config.vision.num_hidden_layers + 1)
        assert case.config.vision.last_layer == states[case.model.config.vision_feature_layer]
        assert case.model.config.vision_feature_layer == layer


@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_llama"])
def test_layers_after_the_last_tap_do_not_run(name):
    case = oracle.case(name)
    batch, _ = batch_of([["one_tile"]], case.prompts, case.config, length=60)
    model, last = build(case.config, oracle.LOOPED), case.config.vision.num_hidden_layers

    def flops(layer):
        def run(params, tiles):
            return model.apply({"params": params}, tiles, (layer,), method="vision")

        lowered = jax.jit(run).lower(case.params, batch["pixel_values"])
        return lowered.cost_analysis()["flops"]

    per_layer = np.diff([flops(layer) for layer in range(last + 1)])
    assert per_layer[0] > 0
    np.testing.assert_allclose(per_layer, per_layer[0], rtol=1e-3)


def test_the_pictures_are_telling():
    """The sizes reach each branch of the any-resolution layout."""
    config, _, _, prompts = oracle.case("siglip_qwen2")
    plans = {name: layouts(prompt, config) for name, prompt in prompts.items()}
    one = {name: plan[0] for name, plan in plans.items() if len(plan) == 1}
    assert {name for name, plan in one.items() if plan.grid == (1, 1)} == {
        "one_tile",
        "smaller_than_a_tile",
    }
    assert {name for name, plan in one.items() if plan.out != plan.unpadded} == {
        "shrunk",
        "shrunk_and_cut",
    }
    assert one["shrunk"].unpadded == (16, 16)
    assert one["shrunk_and_cut"].unpadded[0] < 16
    limit = 9 * config.vision.num_patches
    assert limit < np.prod(one["kept_above_the_maximum"].unpadded) < 1.21 * limit
    assert one["wide"].grid[0] < one["wide"].grid[1]
    assert one["tall"].grid[0] > one["tall"].grid[1]
    # 40 x 61 fills the 12 rows of 3 x 2 tiles and 7.9 of the 8 columns. Of the one column that is
    # not picture (7.9 is cut to 7), half would go on each side: nothing goes.
    assert one["odd_padding"].unpadded == (12, 8)
    assert config.vision.image_size % config.vision.patch_size


def test_the_tiles_are_the_reference_processors():
    """The oracle feeds the reference our own pixel values: they are what it would have made."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    case = oracle.case("siglip_qwen2")
    half = [0.5, 0.5, 0.5]
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": oracle.TILE, "width": oracle.TILE},
        image_grid_pinpoints=[list(pair) for pair in case.config.image.grid_pinpoints],
        image_mean=half,
        image_std=half,
    )
    for name in ("wide", "tall", "shrunk_and_cut"):
        theirs = processor(list(case.prompts[name].pictures), return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(oracle.pixels(case, case.prompts[name])[0], theirs[0])


@pytest.mark.parametrize("name", ["siglip_qwen2", "clip_llama"])
def test_normalizing_on_the_device_rounds_like_the_host(name):
    config = oracle.CONFIGS[name].image
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    ours = np.asarray(jax.jit(lambda x: normalize_on_device(x, config))(every))
    host = normalize(every, config)
    if name == "siglip_qwen2":
        np.testing.assert_array_equal(ours, host)
    np.testing.assert_array_max_ulp(ours, host, maxulp=1)
