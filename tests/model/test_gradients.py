"""Gradients of every parameter equal transformers', any-resolution pictures and packing included.

A gradient sums over positions, so cancellation costs it more digits than a logit has lost: the
bound is 1e-4 of its standard deviation, where 2e-5 is reached.
"""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip("torch")

import torch

from cli_jax.model.vlm import build
from tests.model import oracle, reference
from tests.model.samples import batch_of

BOUND = 1e-4
ROWS = [["two_pictures", "shrunk_and_cut", "no_picture"], ["kept_above_the_maximum"]]


@pytest.mark.parametrize(
    ("name", "compute"), [("siglip_qwen2_tied", oracle.SCANNED), ("clip_llama", oracle.LOOPED)]
)
def test_gradients_of_every_parameter(name, compute):
    case = oracle.case(name)
    batch, places = batch_of(ROWS, case.prompts, case.config, length=320)
    model = build(case.config, compute)
    rng = np.random.default_rng(0)
    weight = np.zeros((*batch["input_ids"].shape, case.config.text.vocab_size), np.float32)
    for place in places:
        place.of(weight)[...] = rng.standard_normal(place.of(weight).shape)

    loss = jax.jit(jax.grad(lambda params: (oracle.logits(model, params, batch) * weight).sum()))
    ours = flatten_dict(jax.tree.map(np.asarray, loss(case.params)))

    case.model.zero_grad()
    for place in places:
        logits = case.model(**oracle.reference_inputs(case, case.prompts[place.name])).logits[0]
        (logits * torch.from_numpy(place.of(weight))).sum().backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in case.model.named_parameters()
    }
    case.model.zero_grad()
    theirs = flatten_dict(reference.to_params(gradients, tied=case.config.text.tie_word_embeddings))

    assert ours.keys() == theirs.keys()
    unused = {path for path in theirs if not theirs[path].any()}
    assert {path[:2] for path in unused} == {("vision_tower", "post_layernorm")}
    for path in unused:
        assert not ours[path].any(), path
    # Its true gradient is zero (see mutations.INVISIBLE), so what there is is rounding.
    keys_bias = ("vision_tower", "encoder", "layers", "self_attn", "k_proj", "bias")
    compared = theirs.keys() - unused - {keys_bias}
    errors = {path: oracle.error(ours[path], theirs[path]) for path in compared}
    assert {path: e for path, e in errors.items() if not e <= BOUND} == {}
