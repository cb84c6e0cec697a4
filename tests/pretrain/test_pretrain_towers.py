"""The two towers: the pooling head against transformers, and what their embeddings depend on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pretrain_small
import pytest

from cli_jax.batch import IGNORE
from cli_jax.config import VisionConfig
from cli_jax.data import SampleSpec, Sizes, collate, make_sample
from cli_jax.data.sources import open_sources
from cli_jax.experiment import ConfigError
from cli_jax.pretrain.towers import AttentionPool, JoinTiles, captions, tiles_in_use
from cli_jax.text import load_tokenizer
from cli_jax.train.setup import make_setup

F32 = jnp.dtype("float32")


def redrawn(params, seed):
    """Every parameter drawn anew, none of them zero or one."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [
        jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 2), F32)
        for x in leaves
    ]
    return jax.tree.unflatten(tree, drawn)


def test_the_pooling_head_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    V, heads = 16, 4
    config = VisionConfig(hidden_size=V, intermediate_size=24, num_attention_heads=heads)
    module = AttentionPool(config, F32, F32)
    x = np.random.default_rng(0).normal(size=(3, 9, V)).astype(np.float32)
    params = redrawn(nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x)["params"]), 1)
    ours = module.apply({"params": params}, x)

    head = SiglipMultiheadAttentionPoolingHead(
        SiglipVisionConfig(
            hidden_size=V, intermediate_size=24, num_attention_heads=heads, layer_norm_eps=1e-6
        )
    )

    def t(leaf):
        return torch.tensor(np.asarray(leaf))

    projections = [params[name] for name in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        head.probe.copy_(t(params["probe"])[None, None])
        head.attention.in_proj_weight.copy_(torch.cat([t(p["kernel"]).T for p in projections]))
        head.attention.in_proj_bias.copy_(torch.cat([t(p["bias"]) for p in projections]))
        head.attention.out_proj.weight.copy_(t(params["out_proj"]["kernel"]).T)
        head.attention.out_proj.bias.copy_(t(params["out_proj"]["bias"]))
        head.layernorm.weight.copy_(t(params["mlp_norm"]["scale"]))
        head.layernorm.bias.copy_(t(params["mlp_norm"]["bias"]))
        for name in ("fc1", "fc2"):
            getattr(head.mlp, name).weight.copy_(t(params["mlp"][name]["kernel"]).T)
            getattr(head.mlp, name).bias.copy_(t(params["mlp"][name]["bias"]))
        norm = torch.nn.functional.layer_norm(
            t(x), (V,), t(params["norm"]["scale"]), t(params["norm"]["bias"]), 1e-6
        )
        theirs = head(norm)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-5, atol=2e-5)


def test_joining_tiles():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 4)), rng.normal(size=(3, 4, 5))
    in_use = np.array([[True, True, True], [True, False, True]])
    ours = JoinTiles(5, F32, F32).apply({"params": {"kernel": kernel}}, x, in_use)
    expected = [sum(x[b, m] @ kernel[m] for m in range(3) if in_use[b, m]) for b in range(2)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The setup, redrawn parameters, a batch of eight pictures in sixteen rows, and its rows."""
    folder = tmp_path_factory.mktemp("data")
    pretrain_small.write_data(folder, scenes=5)
    experiment = pretrain_small.experiment(folder)
    setup = make_setup(experiment)
    data, model = experiment.data, experiment.model
    spec = SampleSpec.from_config(data, model.image, model.vision, load_tokenizer(data.tokenizer))
    ((file,), _, (root,)) = open_sources(data)
    rows = [file[i] for i in range(len(file))]
    samples = [[make_sample(row, root, spec)] for row in rows]
    batch = collate(samples, Sizes.from_config(data, model.vision, 16))
    params = redrawn(jax.jit(lambda: setup.init_params(0))(), 2)
    return setup, params, batch, rows


@pytest.fixture(scope="module")
def apply(tiny):
    setup, params, *_ = tiny
    compiled = jax.jit(lambda batch: setup.model.apply({"params": params}, batch))
    return lambda batch: jax.device_get(compiled(batch))


def changed(batch, **fields):
    return {**batch, **fields}


def test_captions_are_found_in_their_rows(tiny):
    setup, _, batch, rows = tiny
    ids, used = captions(batch, setup.experiment.model.vision.num_patches)
    tokenizer = load_tokenizer(setup.experiment.data.tokenizer)
    assert len(rows) == 8
    for b, row in enumerate(rows):
        length = int(used[b].sum())
        assert used[b, :length].all()
        text = tokenizer.decode(np.asarray(ids)[b, :length].tolist())
        assert text == row["conversations"][1]["value"] + "\n"
    assert not used[8:].any()


def test_rows_without_a_caption_are_not_used(apply, tiny):
    found = apply(tiny[2])
    assert found.used.tolist() == [True] * 8 + [False] * 8
    lengths = np.linalg.norm(found.picture[:8], axis=-1), np.linalg.norm(found.caption[:8], axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_equal_captions_are_known(apply, tiny):
    batch = tiny[2]
    before = apply(batch).same[:8, :8]
    texts = [row["conversations"][1]["value"] for row in tiny[3]]
    assert before.tolist() == [[a == b for b in texts] for a in texts]
    copied = {name: batch[name].copy() for name in ("labels", "input_ids")}
    for field in copied.values():
        field[3] = field[5]
    after = apply(changed(batch, **copied)).same
    assert after[3, 5]
    assert after[5, 3]
    assert not after[3, 4]


def test_padding_tiles_do_not_count(apply, tiny):
    batch = tiny[2]
    in_use = np.asarray(tiles_in_use(batch))
    assert in_use[:8].tolist() == [[True] * 4 + [False]] * 8
    assert not in_use[8:].any()
    pixels = batch["pixel_values"].copy()
    pixels[:, 4] = 77
    before, after = apply(batch), apply(changed(batch, pixel_values=pixels))
    np.testing.assert_array_equal(before.picture[:8], after.picture[:8])
    for tile in range(4):
        pixels = batch["pixel_values"].copy()
        pixels[:8, tile] = 255 - pixels[:8, tile]
        after = apply(changed(batch, pixel_values=pixels))
        assert (np.abs(before.picture[:8] - after.picture[:8]).max(axis=-1) > 1e-3).all(), tile
        np.testing.assert_array_equal(before.caption, after.caption)


def test_boxes_that_change_places_make_another_picture(apply, tiny):
    pixels = tiny[2]["pixel_values"].copy()
    pixels[:, [1, 3]] = pixels[:, [3, 1]]
    before, after = apply(tiny[2]), apply(changed(tiny[2], pixel_values=pixels))
    moved = np.abs(before.picture[:8] - after.picture[:8]).max(axis=-1)
    differ = (tiny[2]["pixel_values"][:8, 1] != tiny[2]["pixel_values"][:8, 3]).any(axis=(1, 2, 3))
    assert differ.sum() > 4
    assert ((moved > 1e-3) == differ).all()


def test_a_caption_is_read_to_its_end_and_no_further(apply, tiny):
    batch = tiny[2]
    before = apply(batch)
    row = 2
    end = np.flatnonzero(batch["labels"][row] != IGNORE)[-1]
    for at, matters in ((end, True), (end - 3, True), (end + 1, False)):
        ids, labels = batch["input_ids"].copy(), batch["labels"].copy()
        ids[row, at] = 9
        if matters:
            labels[row, at] = 9
        after = apply(changed(batch, input_ids=ids, labels=labels))
        assert (np.abs(before.caption[row] - after.caption[row]).max() > 1e-3) == matters, at
        np.testing.assert_array_equal(before.caption[:row], after.caption[:row])


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"template": "qwen_1_5"}},
        {"data": {"pack": True}},
        {"optimizer": {"accumulate": 2}},
    ],
)
def test_what_siglip_cannot_compare_is_refused(tmp_path, changes):
    ((section, ((key, value),)),) = ((s, tuple(v.items())) for s, v in changes.items())
    with pytest.raises(ConfigError, match=f"config.{section}.{key}={value} must be"):
        make_setup(pretrain_small.experiment(tmp_path, **changes))
