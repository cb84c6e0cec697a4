"""Generation with DPVR: three caches, and the same tokens as whole forward passes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.config import RoutingConfig
from cli_jax.data import Sizes, collate
from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.generate.engine import Generator
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small
from tests.fusion import tiny
from tests.generate.whole_passes import greedy
from tests.routing import dpvr_case as case
from tests.train.train_tiny import QUICK

NEW, LAYERS, SATURATION = 12, 4, 2


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A CLI model with DPVR, and six prompts with up to two pictures."""
    folder = tmp_path_factory.mktemp("small")
    base = small.make_experiment(folder, inject=[0, 1])
    text = dataclasses.replace(base.model.text, num_hidden_layers=LAYERS)
    routed = dataclasses.replace(base.model, text=text, routing=RoutingConfig("dpvr", SATURATION))
    experiment = dataclasses.replace(base, model=routed)
    questions = read_questions(small.save_mixed_questions(folder))
    spec = prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), NEW)
    samples = [sample for _, sample in load_prompts(questions, str(folder), spec)]
    return experiment, samples, *small.make_model(experiment)


def generator(model, params):
    never = len(small.PIECES)
    return Generator(model, params, stop_ids=[never], pad_id=0, max_new_tokens=NEW)


def test_equals_the_argmax_of_whole_forward_passes(asked):
    experiment, samples, model, params = asked
    vision = experiment.model.vision
    sizes = Sizes(
        rows=len(samples), length=100 + NEW, visual=32, tiles=5, images=2,
        tile_size=vision.image_size, patches=vision.num_patches, text=120,
    )  # fmt: skip
    asks = collate([[sample] for sample in samples], sizes)
    answers = generator(model, params)(asks, range(len(samples)))
    with_text = functools.partial(case.with_text, slots=sizes.text)
    expected = greedy(model, params, asks, NEW, with_text)
    assert [answer.ids for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) == len(samples)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_the_cache_holds_vision_in_the_first_layers_and_the_last_only():
    c, batch, new = tiny.TEXT, case.packed(), 5
    (B, L), P, Q = batch["input_ids"].shape, tiny.SIZES["visual"], case.TEXT_SLOTS
    m, params = case.model(2), case.redrawn()

    def prefill(params, batch):
        return m.apply({"params": params}, batch, L + new, method="prefill")[1]

    cache = jax.eval_shape(prefill, params, batch)
    heads = c.num_key_value_heads, c.head_dim
    assert cache.shallow.key.shape == (2, B, L + new, *heads)
    assert cache.deep.value.shape == (2, B, Q + new, *heads)
    assert cache.last.key.shape == (1, B, P + Q + new, *heads)
    filled = jax.jit(prefill, compiler_options=QUICK)(params, batch)
    np.testing.assert_array_equal(filled.text.sum(1), case.is_text(batch).sum(1))
    np.testing.assert_array_equal(filled.visual.sum(1), case.is_vision(batch).sum(1))


def test_decoding_runs_no_side_branch():
    """A token's program takes the language model's parameters and nothing of the rest."""
    m, B, L, new = case.model(2), 2, tiny.SIZES["length"], 5
    params = shapes(case.redrawn())
    _, cache = jax.eval_shape(
        lambda p, b: m.apply({"params": p}, b, L + new, method="prefill"), params, case.packed()
    )
    ids = jax.ShapeDtypeStruct((B,), jnp.int32)
    slot, valid = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((B, L + new), bool)

    def decode(params, *args):
        return m.apply({"params": params}, *args, method="decode")

    compiled = jax.jit(decode).lower(params, ids, ids, slot, valid, cache).compile()
    needed = params["language_model"], ids, ids, slot, valid, cache
    taken = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(needed))
    assert compiled.memory_analysis().argument_size_in_bytes <= taken
    named = set(re.findall(r"params\[\\?'(\w+)", compiled.as_text()))
    assert named == {"language_model"}
