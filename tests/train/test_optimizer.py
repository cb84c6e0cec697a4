import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.experiment import ConfigError, GroupConfig, OptimizerConfig
from cli_jax.train.optimizer import (
    assign_rates,
    init_optimizer,
    make_optimizer,
    schedule,
    trained,
)

PATHS = [
    "vision_tower/encoder/layers/mlp/fc1/kernel",
    "multi_modal_projector/linear_1/kernel",
    "language_model/norm/scale",
    "fusion/agf/gate_bias",
]


def groups(*pairs) -> OptimizerConfig:
    return OptimizerConfig(lr=1e-5, groups=tuple(GroupConfig(p, lr) for p, lr in pairs))


def test_the_first_matching_group_decides_and_the_rest_takes_the_base_rate():
    rates = assign_rates(
        PATHS, groups(("vision_tower/.*", 2e-6), ("fusion/.*", 1e-4), (".*/norm/.*", None))
    )
    assert list(rates.values()) == [2e-6, 1e-5, None, 1e-4]
    rates = assign_rates(PATHS, groups(("fusion/.*", 1e-3), (".*", None)))
    assert trained(rates) == {"fusion/agf/gate_bias": 1e-3}
    # first match: the order of the patterns matters
    rates = assign_rates(PATHS, groups((".*/kernel", 1e-3), ("vision_tower/.*|.*/norm/.*", None)))
    assert rates[PATHS[0]] == 1e-3


def test_patterns_match_whole_paths():
    with pytest.raises(ConfigError, match="'vision_tower' matches no parameter"):
        assign_rates(PATHS, groups(("vision_tower", None)))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("vison_tower/.*", 1e-6)], "'vison_tower/.\\*' matches no parameter.*vision_tower/"),
        ([(".*", None), ("fusion/.*", 1e-4)], "'fusion/.\\*' is hidden"),
        ([("(", None)], "'\\(' is not a regular expression"),
        ([(".*", None)], "freezes every parameter"),
    ],
)
def test_patterns_that_decide_nothing_are_errors_that_name_them(pairs, message):
    with pytest.raises(ConfigError, match=message):
        assign_rates(PATHS, groups(*pairs))


@pytest.mark.parametrize(("ratio", "total"), [(0.03, 100), (0.03, 1000), (0.5, 7), (0.0, 10)])
def test_the_schedule_is_that_of_transformers(ratio, total):
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = int(np.ceil(ratio * total))
    reference = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    factor = jax.jit(schedule(OptimizerConfig(warmup_ratio=ratio), total))
    for step in range(total):
        assert float(factor(step)) == pytest.approx(reference.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        reference.step()
    assert float(factor(total)) == pytest.approx(0.0, abs=1e-7)


def test_constant_stays_at_one_after_the_warm_up():
    factor = schedule(OptimizerConfig(schedule="constant", warmup_ratio=0.2), 10)
    assert [float(factor(step)) for step in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert float(schedule(OptimizerConfig(schedule="constant", warmup_ratio=0.0), 10)(0)) == 1.0


def test_updates_are_those_of_torch_with_groups_clipping_and_decay():
    torch = pytest.importorskip("torch")
    from transformers import get_cosine_schedule_with_warmup

    rng = np.random.default_rng(0)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_norm=1.0, warmup_ratio=0.2)
    rates = {"a/kernel": 1e-2, "a/bias": 1e-2, "v/kernel": 1e-3}
    values = {path: rng.normal(size=(3, 4)).astype(np.float32) for path in rates}
    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in values.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs[p]], "lr": lr, "weight_decay": 0.0 if p == "a/bias" else 0.1}
            for p, lr in rates.items()
        ]
    )
    reference = get_cosine_schedule_with_warmup(optimizer, 2, 10)

    def nest(flat):
        return {
            "a": {"kernel": flat["a/kernel"], "bias": flat["a/bias"]},
            "v": {"kernel": flat["v/kernel"]},
        }

    ours = nest({path: jnp.asarray(value) for path, value in values.items()})
    transform = make_optimizer(config, rates, 10)
    state = init_optimizer(transform, ours)
    for step in range(10):
        scale = 10.0 if step % 2 else 0.01  # with and without clipping
        grads = {p: scale * rng.normal(size=(3, 4)).astype(np.float32) for p in rates}
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[path])
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        optimizer.step()
        reference.step()
        updates, state = transform.update(nest(grads), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
    expected = nest({path: p.detach().numpy() for path, p in theirs.items()})
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_clipping_can_be_off():
    grads = {"w": jnp.full(4, 100.0)}
    norms = []
    for clip in (0.0, 1.0):
        config = OptimizerConfig(lr=1.0, clip_norm=clip, warmup_ratio=0.0, eps=10.0)
        transform = make_optimizer(config, {"w": 1.0}, 10)
        updates, _ = transform.update(grads, init_optimizer(transform, grads), grads)
        norms.append(float(jnp.linalg.norm(updates["w"])))
    assert norms[0] > 5 * norms[1]


def test_moments_are_float32_for_bfloat16_parameters():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    transform = make_optimizer(OptimizerConfig(), {"w": 1e-3}, 10)
    state = init_optimizer(transform, params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {str(x.dtype) for x in moments} == {"float32"}
    _, after = transform.update({"w": jnp.ones(4)}, state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
