"""Greedy answers without any cache, for the tests of generation."""

import jax
import numpy as np

from tests.train.train_tiny import QUICK


def greedy(model, params, batch, steps, completed=lambda batch: batch):
    """Token ids [rows][steps], each from a forward pass over prompt and answer so far.

    completed: gives a batch with a further token what else depends on it.
    """
    batch = {name: value.copy() for name, value in batch.items()}
    variables = {"params": params}
    rows = np.arange(len(batch["segment_ids"]))
    length = (batch["segment_ids"] > 0).sum(axis=1)

    def logits_after(batch, last):
        hidden = model.apply(variables, batch).hidden
        return model.apply(variables, hidden[rows, last], method="logits")

    logits_after = jax.jit(logits_after, compiler_options=QUICK)
    answers = []
    for step in range(steps):
        logits = jax.device_get(logits_after(batch, length + step - 1))
        second, first = np.sort(logits, axis=1)[:, -2:].T
        assert (first - second).min() > 1e-4  # no tie that rounding could turn
        token = np.argmax(logits, axis=1)
        answers.append(token)
        at = rows, length + step
        batch["input_ids"][at], batch["positions"][at] = token, length + step
        batch["segment_ids"][at] = 1
        batch = completed(batch)
    return np.stack(answers, axis=1).tolist()
