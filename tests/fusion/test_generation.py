"""Generation with every strategy: logits out of the cache are those of whole forward passes."""

import jax
import numpy as np

from tests.fusion import tiny
from tests.fusion.rows import BASE_ONLY, VOCAB, Turn, make_batch, make_sample
from tests.fusion.strategies import every_strategy
from tests.train.train_tiny import QUICK

NEW = 4


@every_strategy
def test_decoded_tokens_see_what_a_whole_pass_shows_them(entry):
    """Behind prompts with a picture of several tiles, with two pictures, and with none."""
    extras, rng = tiny.extras_of(entry.config), np.random.default_rng(2)
    pictures = [(20, 25)], [BASE_ONLY, (30, 30)], []
    prompts = [[make_sample(rng, Turn(each, 4, 0), extras=extras)] for each in pictures]
    batch = make_batch(prompts, **tiny.sizes(extras))
    model, variables = tiny.model(entry.config), {"params": tiny.redrawn(entry.config)}
    length, total = batch["input_ids"].shape[1], batch["input_ids"].shape[1] + NEW
    used_B = (batch["segment_ids"] > 0).sum(axis=1)
    tokens_TxB = rng.integers(1, VOCAB, (NEW, len(prompts)), np.int32)

    def decode(variables, batch):
        def step(cache, xs):
            t, token_B = xs
            slots = np.arange(total)
            valid = (slots < used_B[:, None]) | ((slots >= length) & (slots <= length + t))
            hidden_BxD, cache = model.apply(
                variables, token_B, used_B + t, length + t, valid, cache, method="decode"
            )
            return cache, model.apply(variables, hidden_BxD, method="logits")

        _, cache = model.apply(variables, batch, cache_length=total, method="prefill")
        return jax.lax.scan(step, cache, (np.arange(NEW), tokens_TxB))[1]

    found_TxBxC = jax.jit(decode, compiler_options=QUICK)(variables, batch)
    whole = {name: value.copy() for name, value in batch.items()}
    rows = np.arange(len(prompts))
    for t in range(NEW):
        at = rows, used_B + t
        whole["input_ids"][at], whole["positions"][at] = tokens_TxB[t], used_B + t
        whole["segment_ids"][at] = 1
    logits_BxLxC, _ = tiny.forward(entry.config, options=tuple(QUICK.items()))(
        variables["params"], whole
    )
    expected_TxBxC = np.stack([logits_BxLxC[rows, used_B + t] for t in range(NEW)])
    assert np.std(expected_TxBxC) > 0.1
    np.testing.assert_allclose(found_TxBxC, expected_TxBxC, atol=2e-4)
