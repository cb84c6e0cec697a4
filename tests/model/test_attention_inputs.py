"""Queries, keys and values of the vision towers equal the references'.

The logits cannot tell whether the tower's keys have their bias: it adds the same number to all
scores of a query. A checkpoint that is trained on must not lose it all the same.
"""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from cli_jax.image.preprocess import normalize
from cli_jax.model import vision
from cli_jax.model.vlm import build
from tests.model import oracle
from tests.model.mutations import INVISIBLE
from tests.model.samples import batch_of

NAMES = ("q_proj", "k_proj", "v_proj")


def ours(case, params, tiles, monkeypatch):
    """Per layer q, k and v [3, layers, tiles, tokens, V] of our tower, caught on their way."""
    caught = []
    attention = vision.attention

    def catch(q, k, v, segment_ids, **kwargs):
        if len(q) == tiles.shape[1]:  # and not flax, looking at shapes with an example of one
            caught.append([np.asarray(x) for x in (q, k, v)])
        return attention(q, k, v, segment_ids, **kwargs)

    monkeypatch.setattr(vision, "attention", catch)
    model = build(case.config, oracle.LOOPED)
    with jax.disable_jit():
        model.apply(
            {"params": params}, tiles, (case.config.vision.num_hidden_layers,), method="vision"
        )
    x = np.array(caught).swapaxes(0, 1)
    return x.reshape(*x.shape[:4], -1)


def theirs(case, tiles):
    caught = {name: [] for name in NAMES}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _module, _args, out, name=name: caught[name].append(out.numpy())
        )
        for layer in case.model.model.vision_tower.encoder.layers
        for name in NAMES
    ]
    pixels = normalize(tiles[0], case.config.image).transpose(0, 3, 1, 2)
    with torch.no_grad():
        case.model.model.vision_tower(torch.from_numpy(pixels))
    for hook in hooks:
        hook.remove()
    return np.stack([np.stack(caught[name]) for name in NAMES])


@pytest.mark.parametrize("mutation", INVISIBLE, ids=lambda m: m.case)
def test_queries_keys_and_values(mutation, monkeypatch):
    case = oracle.case(mutation.case)
    batch, _ = batch_of([["two_pictures"]], case.prompts, case.config, length=80)
    tiles = batch["pixel_values"]
    expected = theirs(case, tiles)
    for mine, reference in zip(ours(case, case.params, tiles, monkeypatch), expected, strict=True):
        assert oracle.error(mine, reference) <= oracle.BOUND
    without_bias = jax.tree.map(np.copy, case.params)
    mutation.params(without_bias)
    keys = ours(case, without_bias, tiles, monkeypatch)[NAMES.index("k_proj")]
    assert oracle.error(keys, expected[NAMES.index("k_proj")]) > 0.1
