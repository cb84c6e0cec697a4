"""Generation equals transformers': logits of decoded tokens, and greedy answers over 32 tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from cli_jax.config import ComputeConfig
from cli_jax.generate.engine import Generator
from cli_jax.model.vlm import build
from tests.model import oracle
from tests.model.samples import FIRST_TEXT_ID, batch_of

STEPS = 32
TIE = 1e-4  # below this margin between the best two logits the reference itself is undecided
NEVER = 10**6  # a stop token that no vocabulary holds
SEED = 8  # of the first dozen the one whose three models repeat themselves least
COMPUTE = ComputeConfig(dtype="float32", scan_layers=True, remat="none")
LENGTH = 220
# One batch of prompts of very different lengths: the shorter ones leave slots that must be masked.
ROWS = [[prompt] for prompt in oracle.SIZES]


def reference_answer(case, prompt):
    """The reference's STEPS tokens, and the margin of its best two logits at each step."""
    inputs = oracle.reference_inputs(case, case.prompts[prompt])
    out = case.model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits, dim=1)[0].topk(2).values
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, (best[:, 0] - best[:, 1]).numpy()


@pytest.mark.parametrize("name", list(oracle.CONFIGS))
def test_greedy_answers(name):
    case = oracle.case(name, seed=SEED)
    batch, _ = batch_of([*ROWS, []], case.prompts, case.config, length=LENGTH)
    generate = Generator(
        build(case.config, COMPUTE), case.params, stop_ids=[NEVER], pad_id=0, max_new_tokens=STEPS
    )
    answers = generate(batch, range(len(ROWS)))
    reference = {prompt: reference_answer(case, prompt) for prompt in oracle.SIZES}
    for answer, (expected, margins) in zip(answers, reference.values(), strict=True):
        assert len(answer.ids) == len(expected) == STEPS
        different = np.flatnonzero(np.array(answer.ids) != expected)
        assert not len(different) or margins[different[0]] < TIE
    # The comparison says something: the models look at their prompts and do not just repeat.
    assert len({tuple(tokens) for tokens, _ in reference.values()}) > 8
    assert max(len(set(tokens)) for tokens, _ in reference.values()) > 5


@pytest.mark.parametrize("name", list(oracle.CONFIGS))
def test_logits_of_decoded_tokens(name):
    """Whatever token was chosen: here a random continuation is fed, so that nothing repeats."""
    case = oracle.case(name)
    batch, places = batch_of(ROWS, case.prompts, case.config, length=LENGTH)
    tokens = np.random.default_rng(0).integers(
        FIRST_TEXT_ID, case.config.text.vocab_size, (STEPS, len(ROWS))
    )
    lengths = np.array([place.length for place in places])
    model, variables, total = build(case.config, COMPUTE), {"params": case.params}, LENGTH + STEPS
    slots = np.arange(total)

    @jax.jit
    def decode(variables, batch):
        def step(cache, xs):
            t, token_B = xs
            valid = (slots < lengths[:, None]) | ((slots >= LENGTH) & (slots <= LENGTH + t))
            hidden_BxD, cache = model.apply(
                variables, token_B, lengths + t, LENGTH + t, valid, cache, method="decode"
            )
            return cache, model.apply(variables, hidden_BxD, method="logits")

        _, cache = model.apply(variables, batch, cache_length=total, method="prefill")
        return jax.lax.scan(step, cache, (jnp.arange(STEPS), tokens))[1]

    ours = np.asarray(decode(variables, batch))
    for row, place in enumerate(places):
        inputs = oracle.reference_inputs(case, case.prompts[place.name])
        for key, more in (("input_ids", tokens[:, row]), ("attention_mask", np.ones(STEPS, int))):
            inputs[key] = torch.cat([inputs[key], torch.from_numpy(more)[None]], dim=1)
        with torch.no_grad():
            theirs = case.model(**inputs).logits[0, -STEPS:].numpy()
        assert oracle.error(ours[:, row], theirs) <= oracle.BOUND, place
