"""What the programs compute: nothing flows back into frozen layers, and skipped work is skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from cli_jax.config import RoutingConfig
from cli_jax.dryrun import flops
from cli_jax.fusion.base import Row
from cli_jax.fusion.none import NoneConfig
from tests.dryrun.test_flops import products
from tests.fusion import tiny
from tests.routing import dpvr_case as case
from tests.train.train_tiny import QUICK

P, L, Q = tiny.SIZES["visual"], tiny.SIZES["length"], case.TEXT_SLOTS
ROWS = 2


def shapes(model):
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in case.packed().items()}
    return jax.eval_shape(lambda b: model.init(jax.random.key(0), b)["params"], batch), batch


def programs(saturation, layers, **compute):
    """The forward pass, its gradient by the side branch alone and by everything, arguments."""
    m = case.model(saturation, text=case.deeper(layers), **compute)
    params, batch = shapes(m)

    def forward(params, batch):
        out = m.apply({"params": params}, batch).scored
        return jnp.sum(m.apply({"params": params}, out.hidden, method="logits"))

    def gradient(params, batch):
        def of(side):
            return forward({**params, "routing": side}, batch)

        return jax.value_and_grad(of)(params["routing"])

    return forward, gradient, jax.grad(forward), (params, batch)


def traced(f, args):
    """FLOPs of the products that a function needs; what the compiler drops is left out."""
    closed = jax.make_jaxpr(f)(*args)
    live, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return products(live)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_backward_pass_through_frozen_layers(scan_layers, remat):
    """More layers before and behind the saturation layer cost their forward pass, nothing more."""
    small, large = (
        [traced(f, args) for f in functions]
        for *functions, args in (
            programs(s, n, scan_layers=scan_layers, remat=remat) for s, n in ((2, 5), (4, 9))
        )
    )
    assert large[0] > small[0]
    assert large[1] - small[1] == large[0] - small[0]
    assert small[1] > small[0]  # the side branch, the last layer and the head do have one
    assert large[2] - small[2] >= 3 * (large[0] - small[0])  # what training them all would cost


def test_the_compiled_program_has_none_either():
    """Unrolled, since the compiler counts a loop's body once."""

    def compiled(f, args):
        return jax.jit(f).lower(*args).compile(QUICK).cost_analysis()["flops"]

    backward = []
    for s, n in ((2, 4), (3, 6)):
        forward, gradient, _, args = programs(s, n, scan_layers=False)
        backward.append(compiled(gradient, args) - compiled(forward, args))
    assert backward[0] > 0
    assert backward[1] == pytest.approx(backward[0], rel=0.02)


@pytest.mark.parametrize(("saturation", "layers"), [(1, 5), (2, 5), (4, 5), (6, 9)])
def test_flops_are_those_of_the_program(saturation, layers):
    """The tracer sees whole squares of attention, which are put right here."""
    forward, _, _, args = programs(saturation, layers)
    c = case.deeper(layers)
    model = dataclasses.replace(
        case.model(saturation, text=c).config, routing=RoutingConfig("dpvr", saturation)
    )
    counted = flops.forward(model, Row(L, P, tiny.SIZES["tiles"], text=Q))
    pairs = saturation * L**2 + P**2 + (layers - 1 - saturation) * Q**2 + Q * (P + Q)
    halves = 2.0 * pairs * c.num_attention_heads * c.head_dim
    assert sum(counted.values()) + halves == pytest.approx(traced(forward, args) / ROWS, rel=0.01)


def paper():
    """LLaVA-1.5-7B's decoder, with the picture and question of the paper."""
    c = dataclasses.replace(
        tiny.TEXT, model_type="llama", vocab_size=32_064, hidden_size=4096,
        intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128,
    )  # fmt: skip
    plain = dataclasses.replace(
        tiny.model(NoneConfig()).config, text=c, routing=RoutingConfig("none")
    )
    return plain, dataclasses.replace(plain, routing=RoutingConfig("dpvr", 18))


def test_what_the_papers_setting_saves():
    plain, routed = paper()
    row = Row(640, 576, 1, text=64)
    before, after = (flops.forward(model, row) for model in (plain, routed))
    layer = 640 * 2 * (4 * 4096**2 + 3 * 4096 * 11_008) + 2 * 640**2 * 4096
    assert before["decoder"] == 32 * layer
    dense = 64 * 2 * (4 * 4096**2 + 3 * 4096 * 11_008) + 2 * 64**2 * 4096
    assert after["decoder"] == 18 * layer + 13 * dense
    assert before["head"] == 10 * after["head"]
    whole = sum(after[part] for part in ("decoder", "side", "late"))
    assert before["decoder"] / whole == pytest.approx(1.564, abs=0.005)


def test_an_update_pays_for_what_it_trains():
    """Side branch: weights and inputs; late layer and head: inputs; all else: forward only."""
    _, routed = paper()
    row = Row(640, 576, 1, text=64)
    once = flops.forward(routed, row)
    rates = {"routing/side_branch/mlp/up_proj/kernel": 1e-4, "language_model/norm/scale": None}
    step = flops.step(routed, row, 3, rates)
    factor = {"side": 3, "late": 2, "head": 2}
    for part, of_row in once.items():
        assert step[part] == 3 * of_row * factor.get(part, 1), part
    all_rates = {**rates, "language_model/norm/scale": 1e-5}
    assert flops.step(routed, row, 1, all_rates)["late"] == 3 * once["late"]


def test_no_group_of_layers_has_its_weights_copied():
    """A scan over a slice of the stack would begin with one."""
    forward, gradient, _, args = programs(2, 6)  # groups of 2, 3 and 1 layers
    D, F = tiny.TEXT.hidden_size, tiny.TEXT.intermediate_size
    for f in (forward, gradient):
        lowered = jax.jit(f).lower(*args).as_text()
        assert f"tensor<6x{D}x{F}xf32>" in lowered
        assert not any(f"tensor<{count}x{D}x{F}xf32>" in lowered for count in (2, 3))
