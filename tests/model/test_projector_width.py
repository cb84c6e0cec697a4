"""A projector with a hidden layer of another width than the decoder's."""

import dataclasses

import jax
import numpy as np
import pytest

from cli_jax.config import ComputeConfig, ModelConfig
from cli_jax.dryrun.flops import forward
from cli_jax.fusion.base import Row
from cli_jax.fusion.deepstack import DeepStackConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.fusion.sli import SLIConfig
from cli_jax.model.vlm import build
from tests.fusion import tiny
from tests.fusion.restatement import float64, projected
from tests.fusion.rows import IMAGE, VISION

IMAGES = tiny.packed()["image_segment"].shape[1]
WIDE = ModelConfig(VISION, tiny.TEXT, IMAGE, "none", NoneConfig(), projector_width=40)


def test_agrees_with_the_formula():
    model, batch = build(WIDE, ComputeConfig(dtype="float32", remat="none")), tiny.packed()
    rng = np.random.default_rng(0)
    V, D = VISION.hidden_size, tiny.TEXT.hidden_size
    sizes = {"linear_1": (V, 40), "linear_2": (40, D)}
    projector = {
        name: {
            "kernel": rng.normal(size=size).astype(np.float32),
            "bias": rng.normal(size=size[1]).astype(np.float32),
        }
        for name, size in sizes.items()
    }
    hidden = rng.normal(size=tiny.hidden_shape(NoneConfig())).astype(np.float32)
    params = {**tiny.redrawn(NoneConfig()), "multi_modal_projector": projector}
    found, _ = model.apply({"params": params}, hidden, batch, None, method=tiny.fuse)
    slots = np.argwhere((batch["visual_image"] < IMAGES) & ~batch["visual_newline"])
    for b, slot in slots[:: max(1, len(slots) // 12)]:
        wanted = projected(float64(params), batch, b, slot, hidden[-1, b].astype(np.float64))
        np.testing.assert_allclose(found[b, slot], wanted, rtol=1e-4, atol=1e-4)


def test_its_parameters_and_flops_are_counted():
    plain = dataclasses.replace(WIDE, projector_width=0)
    sizes = [
        sum(x.size for x in jax.tree.leaves(_shapes(model)["multi_modal_projector"]))
        for model in (plain, WIDE)
    ]
    V, D = VISION.hidden_size, tiny.TEXT.hidden_size
    assert sizes == [(V + 1) * w + (w + 1) * D for w in (D, 40)]
    row = Row(length=30, visual=12, tiles=2)
    per_width = 2 * (2 * VISION.num_patches * V + 12 * D) + 8 * 12
    assert forward(WIDE, row)["projector"] == 40 * per_width
    assert forward(plain, row)["projector"] == D * per_width


@pytest.mark.parametrize("strategy", [DeepStackConfig(stacks=4), SLIConfig(taps=(1, 2))])
def test_strategies_that_project_more_count_it_too(strategy):
    name = tiny.name_of(strategy)

    def flops(width):
        config = dataclasses.replace(WIDE, fusion_name=name, fusion=strategy, projector_width=width)
        return forward(config, Row(length=30, visual=12, tiles=2, images=2))["projector"]

    assert flops(40) / flops(0) == 40 / tiny.TEXT.hidden_size


def _shapes(config):
    model = build(config, ComputeConfig(dtype="float32", remat="none"))
    return jax.eval_shape(model.init, jax.random.key(0), tiny.packed())["params"]
