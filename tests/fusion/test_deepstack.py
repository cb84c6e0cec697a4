"""DeepStack's declarations and refusals; what it computes is in model/test_fused_parity."""

import dataclasses

import jax
import numpy as np
import pytest

from cli_jax.config import ImageConfig, TextConfig
from cli_jax.experiment import ConfigError
from cli_jax.fusion.base import Row
from cli_jax.fusion.deepstack import DeepStack, DeepStackConfig, _base_tokens
from cli_jax.fusion.none import NoneConfig
from cli_jax.image.extras import Extras
from cli_jax.train.setup import make_setup
from tests.fusion import tiny
from tests.train import train_tiny

QWEN2 = TextConfig(num_hidden_layers=28)


def test_decoder_layers():
    assert DeepStack.decoder_layers(DeepStackConfig(), QWEN2) == (1, 2, 3, 4)
    sparse = DeepStackConfig(stacks=3, start=0, interval=9)
    assert DeepStack.decoder_layers(sparse, QWEN2) == (0, 9, 18)
    with pytest.raises(ValueError, match=r"stacks=4 .* layers \[25, 26, 27, 28\]: .* 0\.\.27"):
        DeepStack.decoder_layers(DeepStackConfig(start=25), QWEN2)


@pytest.mark.parametrize(("name", "value"), [("stacks", 0), ("start", -1), ("interval", 0)])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"fusion\.deepstack\.{name} is {value}"):
        dataclasses.replace(DeepStackConfig(), **{name: value})


def test_extra_tiles_where_there_are_none():
    model = tiny.config_of(DeepStackConfig())
    assert DeepStack.extras(DeepStackConfig(), model) == Extras(stacks=4)
    for name in ("square", "pad", "crop"):
        one = dataclasses.replace(model, image=ImageConfig(aspect_ratio=name))
        assert DeepStack.extras(DeepStackConfig(stacks=3), one) == Extras(stacks=3, tiles=3)
        with pytest.raises(ValueError, match=f"stacks=1: .*aspect_ratio={name}.* 2 or more"):
            DeepStack.extras(DeepStackConfig(stacks=1), one)
    with pytest.raises(ValueError, match="3 stacks: any-resolution pictures need a square"):
        DeepStack.extras(DeepStackConfig(stacks=3), model)


def test_a_run_says_in_one_line_what_is_wrong():
    for config, message in (
        ({"stacks": 4}, "stacks=4 are added before the decoder layers"),
        ({"stacks": 1, "start": 0}, "2 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_setup(train_tiny.experiment(fusion={"name": "deepstack", "deepstack": config}))


def test_batches_without_stacks_are_refused():
    config = DeepStackConfig()
    with pytest.raises(ValueError, match=r"has 0 stacks, .*stacks is 4: make the batch with"):
        tiny.model(config).apply({"params": tiny.redrawn(config)}, tiny.packed())


def test_costs():
    model, row = tiny.config_of(DeepStackConfig()), Row(96, 72, 9, 4)
    D, slots = tiny.TEXT.hidden_size, 4 * 4 * 9
    more = DeepStack.flops(DeepStackConfig(), model, row)["projector"]
    more -= DeepStack.flops(DeepStackConfig(stacks=1), model, row)["projector"]
    assert more == (2 * D * D + 8 * D) * slots * 3 / 4
    assert DeepStack.bank_reads(DeepStackConfig(), model, row) == slots * D


def test_base_tokens_are_found_both_ways():
    batch, N = tiny.packed(), tiny.VISION.num_patches
    index, position = map(np.asarray, jax.jit(_base_tokens, static_argnums=1)(batch, N))
    B, L = index.shape
    images = batch["image_segment"].shape[1]
    expected_index = np.full((B, L), images * N)
    expected_position = np.full((B, images * N), L)
    for b in range(B):
        for i in range(images):
            slots = np.flatnonzero(batch["visual_image"][b] == i)[:N]
            for n, slot in enumerate(slots):
                at = batch["visual_position"][b, slot]
                expected_index[b, at], expected_position[b, i * N + n] = i * N + n, at
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(position, expected_position)


def test_pictures_without_stacks_get_nothing():
    """With every weight of the stacks 0, as for pictures among others, the model is `none`."""
    config = DeepStackConfig()
    batch, params = tiny.packed(config), tiny.redrawn(config)
    empty = {**batch, "stack_weight": 0 * batch["stack_weight"]}
    empty["stack_inverse"] = np.full_like(batch["stack_inverse"], batch["stack_index"][0].size)
    logits, _ = tiny.forward(config)(params, empty)
    plain, _ = tiny.forward(NoneConfig())(params, batch)
    np.testing.assert_array_equal(logits, plain)
    assert (tiny.forward(config)(params, batch)[0] != plain).any()
