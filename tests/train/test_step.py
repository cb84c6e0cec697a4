import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny

from cli_jax.batch import IGNORE
from cli_jax.experiment import ConfigError
from cli_jax.train.initial import init_state
from cli_jax.train.loop import to_device
from cli_jax.train.setup import make_setup
from cli_jax.train.state import flatten, leaf_paths, merge, split
from cli_jax.train.step import gradients, lower_step, make_step


def batch_of(setup, seed=0):
    return to_device(setup, train_tiny.make_batch(setup.experiment, seed))


def grads_of(setup, params, batch):
    """(gradients by path, sums) of all leaves, for the setup's accumulation and chunking."""
    trainable, frozen = split(params, {p for p, rate in setup.rates.items() if rate is not None})
    with setup.context():
        run = jax.jit(
            lambda trainable, batch: gradients(setup, trainable, frozen, batch),
            compiler_options=train_tiny.QUICK,
        )
        grads, sums = run(trainable, batch)
    return flatten(grads), sums


def assert_close(a, b):
    assert a.keys() == b.keys()
    for path in a:
        scale = float(jnp.abs(a[path]).max())  # sums in another order: fp32 noise of the largest
        np.testing.assert_allclose(a[path], b[path], atol=5e-6 * scale + 1e-7, err_msg=path)


@pytest.fixture(scope="module")
def reference(setup, initial):
    """Gradients of one batch in one piece, whose rows have very different numbers of labels."""
    batch = train_tiny.make_batch(setup.experiment, 0)
    batch["labels"][:5] = IGNORE
    batch["labels"][5, 8:] = IGNORE
    batch = to_device(setup, batch)
    return batch, grads_of(setup, initial.params, batch)


def with_changes(**changes):
    return make_setup(train_tiny.experiment(**changes))


def test_accumulation_equals_one_big_batch(setup, initial, reference):
    """With microbatches of very different numbers of labeled tokens, empty ones included."""
    batch, (grads, sums) = reference
    cut = with_changes(optimizer={"accumulate": 4})
    cut_grads, cut_sums = grads_of(cut, initial.params, batch)
    assert_close(grads, cut_grads)
    for a, b in zip(sums, cut_sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_chunked_loss_has_the_same_gradients(setup, initial, reference):
    batch, (grads, _) = reference
    chunked = with_changes(compute={"loss_chunk": 7})
    assert_close(grads, grads_of(chunked, initial.params, batch)[0])


def test_a_batch_without_labels_has_a_zero_gradient(setup, update, state):
    batch = train_tiny.make_batch(setup.experiment, 0)
    batch["labels"][:] = IGNORE
    after, metrics = update(state, to_device(setup, batch))
    assert float(metrics["loss"]) == 0.0
    assert float(metrics["grad_norm"]) == 0.0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_metrics_count_what_is_in_the_batch(setup, update, state):
    batch = train_tiny.make_batch(setup.experiment, 3)
    _, metrics = update(state, to_device(setup, batch))
    segments = batch["segment_ids"]
    first = np.diff(segments, axis=1, prepend=0) != 0
    assert float(metrics["tokens"]) == (segments > 0).sum()
    assert float(metrics["images"]) == 2 * len(segments)
    assert float(metrics["labeled"]) == ((batch["labels"] != IGNORE) & ~first).sum()
    assert float(metrics["lr"]) == pytest.approx(setup.experiment.optimizer.lr)
    assert 0 < float(metrics["loss"]) < 10
    assert 0 <= float(metrics["accuracy"]) < 0.5


def test_every_new_parameter_moves_and_the_loss_falls(setup, update, initial, state):
    batch = batch_of(setup)
    losses = []
    for _ in range(12):
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 12
    assert losses[-1] < losses[0] - 0.5
    before, after = flatten(initial.params), flatten(state.params)
    for path in before:
        moved = not np.array_equal(before[path], after[path])
        # Carried for the round trip, never used.
        assert moved == ("post_layernorm" not in path), path


GROUPS = [
    {"pattern": "fusion/.*", "lr": 1e-2},
    {"pattern": "multi_modal_projector/.*", "lr": 1e-3},
    {"pattern": ".*", "lr": None},
]


def test_frozen_leaves_keep_their_bytes_and_have_no_optimizer_state(initial):
    setup = make_setup(train_tiny.experiment(optimizer={"groups": GROUPS}))
    frozen = [path for path, rate in setup.rates.items() if rate is None]
    moments = [p for p, leaf in leaf_paths(setup.state.opt_state).items() if leaf.shape]
    assert len(moments) == 2 * (len(setup.rates) - len(frozen))
    assert not any(path in moment for path in frozen for moment in moments)

    state = init_state(setup, {})
    before = {path: np.array(leaf) for path, leaf in flatten(state.params).items()}
    compiled = lower_step(setup).compile(train_tiny.QUICK)
    for seed in range(3):
        state, _ = compiled(state, batch_of(setup, seed))
    after = flatten(state.params)
    for path in frozen:
        assert before[path].tobytes() == np.array(after[path]).tobytes(), path
    # After Adam's first steps every number has moved by about its group's rate.
    step = {path: np.abs(after[path] - before[path]).max() for path in before}
    assert 1e-2 < step["fusion/amp/lora_B"] < 4e-2
    assert 1e-3 < step["multi_modal_projector/linear_1/kernel"] < 4e-3


def test_bfloat16_parameters_keep_their_type_through_an_update():
    setup = make_setup(
        train_tiny.experiment(
            compute={"dtype": "bfloat16", "param_dtype": "bfloat16"},
            optimizer={"accumulate": 2, "weight_decay": 0.1},
        )
    )
    with setup.context():
        after, metrics = jax.eval_shape(make_step(setup), setup.state, setup.batch)
        grads, _ = jax.eval_shape(
            lambda params, batch: gradients(setup, params, {}, batch),
            setup.state.params,
            setup.batch,
        )

    def describe(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert describe(after) == describe(setup.state)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(after.params)} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((grads, metrics))} == {"float32"}


def count_dots(jaxpr) -> int:
    """Matrix products in a jaxpr, those in loops and calls included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    count += count_dots(inner)
    return count


def test_no_backward_pass_is_built_for_frozen_leaves(setup):
    def dots(groups) -> int:
        made = make_setup(train_tiny.experiment(optimizer={"groups": groups}))
        trained = {path for path, rate in made.rates.items() if rate is not None}
        trainable, frozen = split(made.state.params, trained)
        with made.context():
            return count_dots(
                jax.make_jaxpr(lambda t, f, b: gradients(made, t, f, b))(
                    trainable, frozen, made.batch
                ).jaxpr
            )

    with setup.context():
        forward = count_dots(
            jax.make_jaxpr(
                lambda params, batch: setup.model.apply(
                    {"params": params},
                    setup.model.apply({"params": params}, batch).hidden,
                    method="logits",
                )
            )(setup.state.params, setup.batch).jaxpr
        )
    everything = dots([])
    head_only = dots([{"pattern": "lm_head/.*", "lr": 1e-3}, {"pattern": ".*", "lr": None}])
    tower_frozen = dots([{"pattern": "vision_tower/.*", "lr": None}])
    assert head_only == forward + 1
    assert head_only < tower_frozen < everything
    vision_products = 6 + 2 + 1  # a layer's, its attention's, the patch embedding's
    # two backward products each, but none of the first one's input
    assert everything - tower_frozen >= 2 * vision_products - 1


def test_split_and_merge_are_inverse():
    params = {"a": {"b": 1, "c": 2}, "d": 3}
    inside, outside = split(params, {"a/c", "d"})
    assert inside == {"a": {"c": 2}, "d": 3}
    assert outside == {"a": {"b": 1}}
    assert merge(inside, outside) == params


def test_loaded_leaves_are_taken_and_the_others_initialized(setup, initial):
    path = "language_model/norm/scale"
    loaded = {path: jnp.full(32, 3.0)}
    state = init_state(setup, loaded)
    assert loaded[path].is_deleted()  # its buffer is the state's now: no second copy
    for name, leaf in flatten(state.params).items():
        expected = np.full(32, 3.0) if name == path else flatten(initial.params)[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_another_seed_draws_other_parameters(setup, initial):
    path = "lm_head/kernel"
    first, again, other = (
        jax.jit(lambda seed=seed: flatten(setup.init_params(seed))[path])() for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, flatten(initial.params)[path])
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_updates_inputs_are_donated(setup, update, state):
    before = jax.tree.leaves(state.params)
    update(state, batch_of(setup))
    assert all(leaf.is_deleted() for leaf in before)


def test_rows_that_cannot_be_cut_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size=8 is not a multiple of .*accumulate=3"):
        make_setup(train_tiny.experiment(optimizer={"accumulate": 3}))
