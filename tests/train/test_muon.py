"""Muon: the layers' matrices by a restatement, the rest by Adam; resumed and sharded like AdamW."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny
from train_processes import run_child

from cli_jax.experiment import OptimizerConfig
from cli_jax.train.checkpoint import Checkpoints, load_params
from cli_jax.train.initial import init_state
from cli_jax.train.loop import to_device
from cli_jax.train.optimizer import init_optimizer, make_optimizer
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten, leaf_paths, unflatten
from cli_jax.train.step import lower_step

SHAPES = {
    "language_model/layers/mlp/up_proj/kernel": (3, 8, 20),
    "vision_tower/encoder/layers/mlp/fc2/kernel": (2, 20, 8),
    "language_model/layers/input_layernorm/scale": (3, 8),
    "vision_tower/encoder/layers/mlp/fc2/bias": (2, 8),
    "language_model/embed_tokens/embedding": (11, 8),
    "lm_head/kernel": (8, 11),
    "multi_modal_projector/linear_1/kernel": (8, 8),
    "fusion/amp/lora_A": (2, 8, 4),
}
MATRICES = list(SHAPES)[:2]
RATES = dict.fromkeys(SHAPES, 1e-2) | {MATRICES[1]: 1e-3}


def orthogonalized(matrix):
    """Five Newton-Schulz steps on the polynomial of Jordan et al. 2024."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def run(name, grads, values):
    """The leaves after each of the gradients, at a constant rate."""
    config = OptimizerConfig(
        name=name, lr=1e-2, schedule="constant", warmup_ratio=0.0, weight_decay=0.1, clip_norm=0.0
    )
    transform = make_optimizer(config, RATES, 10)
    params = unflatten({path: jnp.asarray(value) for path, value in values.items()})
    state = init_optimizer(transform, params)
    for grad in grads:
        updates, state = transform.update(unflatten(grad), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return flatten(params), state


def test_matrices_follow_the_restatement_and_all_else_is_adamw():
    rng = np.random.default_rng(0)
    values, *grads = (
        {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()} for _ in range(4)
    )
    ours, state = run("muon", grads, values)
    adam, _ = run("adamw", grads, values)
    for path in SHAPES:
        if path not in MATRICES:
            np.testing.assert_array_equal(ours[path], adam[path], err_msg=path)
            continue
        expected, momentum = values[path].astype(np.float64), 0.0
        for count, grad in enumerate((g[path] for g in grads), start=1):
            momentum = 0.95 * momentum + 0.05 * grad
            ahead = 0.95 * momentum / (1 - 0.95 ** (count + 1)) + 0.05 * grad / (1 - 0.95**count)
            step = 0.2 * np.sqrt(20) * np.stack([orthogonalized(x) for x in ahead])
            expected = expected - RATES[path] * (step + 0.1 * expected)
        np.testing.assert_allclose(ours[path], expected, atol=2e-6, err_msg=path)
    moments = [path for path, leaf in leaf_paths(state).items() if jnp.ndim(leaf) > 1]
    assert len(moments) == 2 * (len(SHAPES) - 2) + 2  # one moment of a matrix instead of two


def test_an_update_is_as_large_as_adams():
    rng = np.random.default_rng(1)
    values = {p: np.zeros(s, np.float32) for p, s in SHAPES.items()}
    grads = [{p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}]
    ours, _ = run("muon", grads, values)
    for path in MATRICES:
        rms = float(jnp.sqrt(jnp.mean(ours[path] ** 2))) / RATES[path]
        assert 0.1 < rms < 0.3, path


def test_a_gradient_of_zero_leaves_the_decay_alone():
    values = {p: np.ones(s, np.float32) for p, s in SHAPES.items()}
    zeros = {p: np.zeros(s, np.float32) for p, s in SHAPES.items()}
    ours, _ = run("muon", [zeros], values)
    for path in MATRICES:
        np.testing.assert_allclose(ours[path], 1 - 0.1 * RATES[path], rtol=1e-6)


@pytest.fixture(scope="module")
def tiny():
    """(setup, its compiled update) of the tiny run with Muon."""
    setup = make_setup(train_tiny.experiment(optimizer={"name": "muon"}))
    return setup, lower_step(setup).compile(train_tiny.QUICK)


def go_on(tiny, state, data, updates):
    """The state after more updates, and their losses."""
    losses = []
    for _ in range(updates):
        state, metrics = tiny[1](state, to_device(tiny[0], next(data)))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_saved_run_goes_on_to_the_same_bits(tiny, tmp_path):
    setup, data = tiny[0], train_tiny.Data(tiny[0].experiment)
    state, _ = go_on(tiny, init_state(setup, {}), data, 2)
    checkpoints = Checkpoints(tmp_path, setup.experiment.checkpoint)
    checkpoints.save(state, data, setup.experiment, "abc")
    checkpoints.wait()
    whole, _ = go_on(tiny, state, data, 2)
    again = train_tiny.Data(setup.experiment)
    restored = checkpoints.restore(setup.state, again, setup.experiment)
    checkpoints.close()
    resumed, _ = go_on(tiny, restored, again, 2)
    assert sum("mu/language_model" in path for path in leaf_paths(whole)) > 3
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_four_devices_give_the_numbers_of_one(tiny, tmp_path):
    changes = {"optimizer": {"name": "muon"}, "mesh": {"data": 1, "fsdp": 2, "tensor": 2}}
    stop = ("--terminate_at_batch", "3", "--changes", json.dumps(changes))
    done = run_child(tmp_path / "cache", tmp_path / "run", *stop, devices=4)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    state, losses = go_on(tiny, init_state(tiny[0], {}), train_tiny.Data(tiny[0].experiment), 3)
    np.testing.assert_allclose([json.loads(x)["loss"] for x in lines], losses, rtol=2e-4)
    params = flatten(load_params(tmp_path / "run"))
    for path, leaf in flatten(state.params).items():
        np.testing.assert_allclose(params[path], leaf, atol=1e-3, err_msg=path)


def test_momentum_lies_where_its_matrix_does(tiny):
    setup = tiny[0]
    state, params = leaf_paths(setup.state.opt_state), flatten(setup.state.params)
    kernel = "language_model/layers/mlp/up_proj/kernel"
    (found,) = [leaf for path, leaf in state.items() if path.endswith(kernel)]
    assert (found.shape, found.sharding) == (params[kernel].shape, params[kernel].sharding)
