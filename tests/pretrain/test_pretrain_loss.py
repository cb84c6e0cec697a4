"""The SigLIP loss against its formula in numpy and against transformers' SiglipModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.pretrain.loss import pair_sums
from cli_jax.pretrain.towers import Pairs, unit

B, D = 6, 8


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    picture, caption = rng.normal(size=(2, B, D))
    return picture, caption, rng.normal(2, 0.3), rng.normal(-3, 1)


def logits_of(picture, caption, log_scale, bias):
    params = {"scale": jnp.float32(log_scale), "bias": jnp.float32(bias)}
    pair = unit(jnp.asarray(picture)), unit(jnp.asarray(caption))
    return Pairs().apply({"params": params}, *pair)


def restated(picture, caption, log_scale, bias, texts, used):
    """Equation 1 of the paper, pair by pair, without the pairs of equal texts."""
    loss = 0.0
    for i in range(B):
        for j in range(B):
            if not (used[i] and used[j]) or (i != j and texts[i] == texts[j]):
                continue
            x, y = picture[i] / np.linalg.norm(picture[i]), caption[j] / np.linalg.norm(caption[j])
            z = 1 if i == j else -1
            loss += np.log(1 + np.exp(z * (-np.exp(log_scale) * (x @ y) - bias)))
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("texts", ["abcdef", "abacab"])
@pytest.mark.parametrize("used", [(1,) * 6, (1, 1, 1, 0, 1, 0)])
def test_against_the_formula(seed, texts, used):
    given = embeddings(seed)
    used = np.array(used, bool)
    same = np.array([[a == b for b in texts] for a in texts])
    sums = pair_sums(logits_of(*given), jnp.asarray(same), jnp.asarray(used))
    np.testing.assert_allclose(sums.loss, restated(*given, texts, used), rtol=1e-5)
    assert float(sums.weight) == float(sums.labeled) == used.sum()


def test_against_transformers():
    torch = pytest.importorskip("torch")
    from transformers import SiglipConfig, SiglipModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    small = {
        "hidden_size": D,
        "intermediate_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    reference = SiglipModel(
        SiglipConfig(text_config={**small, "vocab_size": 8}, vision_config=small)
    )
    picture, caption, log_scale, bias = embeddings()

    class Gives(torch.nn.Module):
        def __init__(self, x):
            super().__init__()
            self.x = torch.nn.Parameter(torch.tensor(x, dtype=torch.float32))

        def forward(self, **_):
            return BaseModelOutputWithPooling(pooler_output=self.x)

    reference.vision_model, reference.text_model = Gives(picture), Gives(caption)
    with torch.no_grad():
        reference.logit_scale.fill_(log_scale)
        reference.logit_bias.fill_(bias)
    out = reference(input_ids=None, pixel_values=None, return_loss=True)
    out.loss.backward()

    def loss(*given):
        logits = logits_of(*given)
        sums = pair_sums(logits, jnp.eye(B, dtype=bool), jnp.ones(B, bool))
        return sums.loss / sums.weight, logits

    given = [jnp.asarray(x, jnp.float32) for x in (picture, caption, log_scale, bias)]
    (ours, logits), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*given)
    np.testing.assert_allclose(logits, out.logits_per_image.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours, out.loss.item(), rtol=1e-6)
    theirs = (
        reference.vision_model.x.grad,
        reference.text_model.x.grad,
        reference.logit_scale.grad[0],
        reference.logit_bias.grad[0],
    )
    for mine, other in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_it_starts_as_the_paper_says():
    params = Pairs().init(jax.random.key(0), jnp.ones((2, 3)), jnp.ones((2, 3)))["params"]
    assert float(params["scale"]) == pytest.approx(np.log(10))
    assert float(params["bias"]) == -10


def test_a_picture_is_right_if_no_other_caption_is_nearer():
    logits = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
    every = jnp.ones(3, bool)
    assert float(pair_sums(logits, jnp.eye(3, dtype=bool), every).correct) == 1
    same = jnp.eye(3, dtype=bool).at[0, 2].set(True).at[2, 0].set(True)
    assert float(pair_sums(logits, same, every).correct) == 2
    assert float(pair_sums(logits, same, jnp.array([True, False, True])).correct) == 2


def test_equal_captions_do_not_push_a_picture_away():
    logits = jnp.zeros((2, 2))
    same = jnp.ones((2, 2), bool)

    def loss(logits):
        return pair_sums(logits, same, jnp.ones(2, bool)).loss

    gradient = jax.grad(loss)(logits)
    np.testing.assert_allclose(gradient, -0.5 * np.eye(2))
