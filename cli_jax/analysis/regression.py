"""Multinomial logistic regression: what can be read off a vector linearly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PENALTIES = (1.0, 0.1, 0.01, 0.001)  # on half the squared weights, against the mean cross-entropy
ITERATIONS = 60  # of L-BFGS, from zero


def read_out(
    x_nxF: np.ndarray, y_n: np.ndarray, fit: np.ndarray, choose: np.ndarray, classes: int
) -> np.ndarray:
    """The class int [n] that a regression on the samples `fit` finds in every sample.

    x float32, y int in 0..classes-1; `fit` and `choose` are bool [n]. Features are standardized by
    the samples `fit`; of the penalties the one that does best on `choose` is taken, the larger one
    of two that are equally good.
    """
    mean, spread = x_nxF[fit].mean(axis=0), x_nxF[fit].std(axis=0)
    x_nxF = (x_nxF - mean) / np.where(spread > 0, spread, 1)
    found = np.asarray(_fitted(x_nxF, y_n, fit.astype(np.float32), classes))
    best = np.argmax(np.mean(found[:, choose] == y_n[choose], axis=1))
    return found[best]


@functools.partial(jax.jit, static_argnames="classes")
def _fitted(x_nxF: Any, y_n: Any, weight_n: Any, classes: int) -> jax.Array:
    """The class of every sample under the regression of each penalty: int [len(PENALTIES), n]."""

    def logits(params: Any) -> jax.Array:
        return x_nxF @ params["kernel"] + params["bias"]

    def with_penalty(penalty: jax.Array) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            each = optax.softmax_cross_entropy_with_integer_labels(logits(params), y_n)
            mean = jnp.sum(each * weight_n) / jnp.sum(weight_n)
            return mean + penalty / 2 * jnp.sum(jnp.square(params["kernel"]))

        solver = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = solver.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            return (optax.apply_updates(params, updates), state), None

        zero = {"kernel": jnp.zeros((x_nxF.shape[1], classes)), "bias": jnp.zeros(classes)}
        (params, _), _ = jax.lax.scan(step, (zero, solver.init(zero)), None, length=ITERATIONS)
        return jnp.argmax(logits(params), axis=-1)

    return jax.lax.map(with_penalty, jnp.array(PENALTIES))
