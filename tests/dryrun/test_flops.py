"""Model FLOPs against the products that JAX's tracer lists, and their split by part."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from cli_jax.config import TextConfig, VisionConfig
from cli_jax.dryrun import bounds, flops
from cli_jax.fusion import registry
from cli_jax.fusion.base import Row
from cli_jax.fusion.none import NoneConfig
from cli_jax.model import vlm
from cli_jax.train.setup import make_setup
from tests.train import train_tiny


def products(jaxpr):
    """FLOPs of all matrix products of a program, loops unrolled by their length."""
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            out = equation.outvars[0].aval.shape
            if name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                inner = [equation.invars[0].aval.shape[i] for i in contracted]
            else:
                inner = equation.invars[1].aval.shape[:-1]  # [h, w, in, out]
            total += 2.0 * np.prod(out) * np.prod(inner)
        inner = sum(products(sub) for sub in jaxprs_in_params(equation.params))
        total += inner * (equation.params["length"] if name == "scan" else 1)
    return total


def experiment(fusion, scan):
    base = train_tiny.config()
    base["fusion"] = fusion
    base["compute"]["scan_layers"] = scan
    base["model"]["vision"] |= {"num_hidden_layers": 3, "image_size": 16}  # 16 patches
    base["data"]["visual_per_row"] = 20
    base["model"]["text"]["num_hidden_layers"] = 4
    return train_tiny.experiment(**{k: base[k] for k in ("fusion", "compute", "model", "data")})


def traced_products(e):
    """FLOPs of a row's forward pass, by the tracer."""
    setup = make_setup(e, jax.devices()[:1])
    model = vlm.build(e.model, e.compute)

    def forward(params, batch):
        hidden = model.apply({"params": params}, batch).hidden
        return model.apply({"params": params}, hidden, method="logits")

    program = jax.make_jaxpr(forward)(setup.state.params, setup.batch)
    return products(program.jaxpr) / e.data.batch_size


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "fusion",
    [
        {"name": "none"},
        {"name": "cli", "cli": {"taps": (1, 3), "inject": (0, 2)}},
        {"name": "sli"},
        {"name": "layer_concat", "layer_concat": {"layers": (1, 3)}},
        {"name": "mmfuser", "mmfuser": {"points": 2}},
        {"name": "deepstack", "deepstack": {"stacks": 3}},
        {"name": "adapter", "adapter": {"inject": (0, 2), "rank": 8}},
        {"name": "dense_connector"},
        {"name": "dense_connector", "dense_connector": {"variant": "sci"}},
        {"name": "dense_connector", "dense_connector": {"variant": "sti"}},
    ],
    ids=lambda fusion: "-".join([fusion["name"], *fusion.get("dense_connector", {}).values()]),
)
def test_products_are_those_that_the_program_has(fusion, scan):
    """The tracer sees whole squares of attention and no gather: both are put right here."""
    e = experiment(fusion, scan)
    traced = traced_products(e)
    row, text = flops.row_of(e), e.model.text
    counted = flops.forward(e.model, row)
    square = 2.0 * row.length**2 * text.num_attention_heads * text.head_dim
    attention = text.num_hidden_layers * square  # the half that causality leaves out
    assert sum(counted.values()) + attention == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gathered"),  # widths of what passes the gather plan, which the tracer does not see
    [("none", 32), ("sli", 4 * 32), ("layer_concat", 3 * 16), ("mmfuser", 32)],
)
def test_what_stands_between_tower_and_decoder_is_counted_exactly(name, gathered):
    e, towers = experiment({"name": name}, True), experiment({"name": "none"}, True)
    row, between = flops.row_of(e), ("fusion", "projector")
    counted, base = flops.forward(e.model, row), flops.forward(towers.model, row)
    counted = sum(counted[part] for part in between) - 8.0 * gathered * row.visual
    base = sum(base[part] for part in between) - 8.0 * 32 * row.visual
    traced = traced_products(e) - traced_products(towers)
    assert counted - base == pytest.approx(traced, rel=1e-6)
    assert counted > 0


def test_a_step_is_three_forwards_where_everything_is_trained():
    e = experiment({"name": "none"}, True)
    row = flops.row_of(e)
    rates = make_setup(e, jax.devices()[:1]).rates
    once, step = flops.forward(e.model, row), flops.step(e.model, row, 5, rates)
    assert step["decoder"] == pytest.approx(3 * 5 * once["decoder"])
    assert step["vision"] == pytest.approx(3 * 5 * once["vision"])  # its pixels need no gradient,
    # which is a product of the patch embedding only: it is counted as if it did


def test_nothing_flows_back_into_what_is_frozen_and_first():
    e = experiment({"name": "none"}, True)
    row = flops.row_of(e)
    rates = dict.fromkeys(make_setup(e, jax.devices()[:1]).rates)
    rates["multi_modal_projector/linear_1/kernel"] = 1e-3
    once, step = flops.forward(e.model, row), flops.step(e.model, row, 1, rates)
    assert step["vision"] == once["vision"]
    assert step["projector"] == 3 * once["projector"]
    assert step["decoder"] == 2 * once["decoder"]  # gradients of its inputs, not of its weights
    assert step["head"] == 2 * once["head"]


def test_published_model_has_the_usual_six_flops_a_token_and_weight():
    text = TextConfig("qwen2", 152_128, 3584, 18_944, 28, 28, 4, 128)
    model = dataclasses.replace(
        experiment({"name": "none"}, True).model,
        vision=VisionConfig(),
        text=text,
        fusion_name="none",
        fusion=NoneConfig(),
    )
    step = flops.step(model, Row(2048, 1500, 2), 1, {"language_model/x": 1e-5, "lm_head/x": 1e-5})
    weights = 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18_944)
    attention = 28 * 2 * 2048**2 * 3584
    assert step["decoder"] == pytest.approx(3 * (2 * 2048 * weights + attention))
    assert step["head"] == 6 * 2048 * 3584 * 152_128


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_every_strategy_counts_itself(name):
    model = experiment({"name": name, "deepstack": {"stacks": 3}}, True).model
    counted = registry.of(model).flops(model.fusion, model, Row(64, 32, 2))
    assert counted["fusion" if name == "layer_concat" else "projector"] > 0
    assert set(counted) <= set(flops.PARTS)


def test_offload_repeats_what_full_does():
    def repeated(remat):
        e = train_tiny.experiment(compute={"remat": remat, "loss_chunk": 0})
        return bounds._repeated(e, SimpleNamespace(setup=make_setup(e, jax.devices()[:1])))

    assert repeated("offload") == repeated("full") > repeated("none") == 0
