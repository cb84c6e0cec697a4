"""Checkpoints into arrays: every leaf, any slice of it, and everything that does not fit."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hf_models import (
    CLIP,
    LLAMA,
    QWEN,
    QWEN_UNTIED,
    SIGLIP,
    abstract_params,
    hub_config,
    model_config,
    original_config,
    same,
    source,
    stored,
    weights,
    write,
)

from cli_jax.hf import names
from cli_jax.hf.checkpoint import read
from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import _leaf_reader, load_params


def by_hand(tensors):
    """Canonical tensors -> our flat parameters, spelled out family by family."""
    t, out = tensors, {}
    layers = {
        "vision_tower.encoder.layers": 1 + max(names.vision_layer(n) or 0 for n in t),
        "language_model.layers": sum("input_layernorm" in n for n in t),
    }

    def put(name, path, transform):
        for prefix, count in layers.items():
            if name.startswith(f"{prefix}.0."):
                rest = name.removeprefix(f"{prefix}.0.")
                rows = [transform(t[f"{prefix}.{i}.{rest}"]) for i in range(count)]
                out[path.replace("/0/", "/")] = np.stack(rows)
                return
            if name.startswith(prefix):
                return
        out[path] = transform(t[name])

    for name, tensor in t.items():
        stem = name.replace(".", "/").removesuffix("/weight")
        if name.endswith(".bias") or name in ("image_newline",) or "class_embedding" in name:
            put(name, stem, lambda x: x)
        elif "norm" in stem.split("/")[-1]:
            put(name, f"{stem}/scale", lambda x: x)
        elif stem.endswith(("embed_tokens", "position_embedding")):
            put(name, f"{stem}/embedding", lambda x: x)
        elif tensor.ndim == 4:
            put(name, f"{stem}/kernel", lambda x: x.transpose(2, 3, 1, 0))
        else:
            put(name, f"{stem}/kernel", lambda x: x.T)
    return out


@pytest.mark.parametrize(
    ("layout", "vision", "text", "dtype"),
    [
        ("hub", SIGLIP, QWEN, "float32"),
        ("memory5", SIGLIP, QWEN_UNTIED, "bfloat16"),
        ("memory4", CLIP, LLAMA, "float16"),
        ("saved5", CLIP, LLAMA, "float32"),
    ],
)
def test_every_leaf(tmp_path, layout, vision, text, dtype):
    folder, tensors, _ = source(tmp_path, vision, text, layout, dtype, shards=3)
    config = model_config(vision, text)
    loaded = load_params(folder, config, abstract_params(config))
    found, wanted = flatten_dict(loaded.params, sep="/"), by_hand(tensors)
    assert set(found) == set(wanted)
    assert loaded.missing == ()
    for path, array in found.items():
        assert isinstance(array, jax.Array)
        assert same(np.asarray(array), wanted[path].astype(np.float32)), path


def test_dtype_follows_the_model(tmp_path):
    folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
    config = model_config(SIGLIP, QWEN)
    loaded = load_params(folder, config, abstract_params(config, "bfloat16"))
    wanted = by_hand(tensors)
    for path, array in flatten_dict(loaded.params, sep="/").items():
        assert same(np.asarray(array), wanted[path].astype(ml_dtypes.bfloat16)), path


def test_original_checkpoint_of_published_towers_loads_by_config(tmp_path):
    """lmms-lab naming, described by our config only up to the tower's published name."""
    tensors = weights(SIGLIP, QWEN, newline=True)
    folder = write(tmp_path / "in", stored(tensors, "original"), original_config(QWEN, "so400m"))
    config = model_config(SIGLIP, QWEN)
    with pytest.raises(ConversionError, match="names its vision tower"):
        load_params(folder, config, abstract_params(config))


def test_any_box_of_any_leaf(tmp_path, monkeypatch):
    """What a device of a mesh asks for, with blocks so small that reads start inside the box."""
    monkeypatch.setattr("cli_jax.hf.tensor.BLOCK_BYTES", 300)
    rng = np.random.default_rng(0)
    tensors = weights(CLIP, LLAMA, newline=False)
    folder = write(tmp_path / "in", stored(tensors, "hub"), hub_config(CLIP, LLAMA))
    on_disk = read(folder).tensors
    wanted = by_hand(tensors)
    leaves = names.leaves(names.expected(CLIP, LLAMA, has_newline=False))
    abstract = flatten_dict(abstract_params(model_config(CLIP, LLAMA)), sep="/")
    for path, leaf in leaves.items():
        reader = _leaf_reader(leaf, on_disk, abstract[path])
        for _ in range(4):
            ends = [sorted(rng.integers(0, n + 1, 2)) for n in leaf.shape]
            box = tuple(
                slice(int(a), int(b)) if rng.random() < 0.7 else slice(None) for a, b in ends
            )
            np.testing.assert_array_equal(reader(box), wanted[path][box], err_msg=f"{path} {box}")


def test_shardings_are_honored(tmp_path):
    folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
    config = model_config(SIGLIP, QWEN)
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    abstract = abstract_params(config)
    placed = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P(*[None] * (len(x.shape) - 1), "fsdp")), abstract
    )
    with_shardings = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    given = load_params(folder, config, abstract, shardings=placed).params
    carried = load_params(folder, config, with_shardings).params
    for params in (given, carried):
        agree = jax.tree.map(lambda x, s: x.sharding == s, params, placed)
        assert all(jax.tree.leaves(agree))
    wanted = by_hand(tensors)
    for path, array in flatten_dict(carried, sep="/").items():
        np.testing.assert_array_equal(np.asarray(array), wanted[path])


class TestWhatMayBeMissing:
    def test_a_fusion_strategy_is_new(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        config = model_config(SIGLIP, QWEN, "cli")
        abstract = abstract_params(config)
        loaded = load_params(folder, config, abstract)
        own = {p for p in flatten_dict(abstract, sep="/") if p.startswith("fusion/")}
        assert own
        assert set(loaded.missing) == own
        assert "fusion" not in loaded.params

    def test_a_newline_that_the_source_never_had(self, tmp_path):
        tensors = weights(CLIP, LLAMA, newline=False)
        folder = write(tmp_path / "in", stored(tensors, "hub"), hub_config(CLIP, LLAMA))
        config = dataclasses.replace(model_config(CLIP, LLAMA), has_newline=True)
        loaded = load_params(folder, config, abstract_params(config))
        assert loaded.missing == ("image_newline",)

    def test_a_projector_only_if_the_conversion_left_it_open(self, tmp_path):
        tensors = weights(SIGLIP, QWEN, newline=True)
        tensors = {n: t for n, t in tensors.items() if "projector" not in n}
        folder = write(tmp_path / "in", stored(tensors, "hub"), hub_config(SIGLIP, QWEN))
        config = model_config(SIGLIP, QWEN)
        with pytest.raises(ConversionError, match=r"missing multi_modal_projector.linear_1.weight"):
            load_params(folder, config, abstract_params(config))
        names_ = [
            f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")
        ]
        (folder / "conversion.json").write_text(json.dumps({"initialize": names_}))
        loaded = load_params(folder, config, abstract_params(config))
        assert len(loaded.missing) == 4
        assert all(path.startswith("multi_modal_projector/") for path in loaded.missing)


class TestWhatDoesNotFit:
    def test_numbers_that_change_the_result(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        text = dataclasses.replace(QWEN, rope_theta=1e4, rms_norm_eps=1e-5)
        config = dataclasses.replace(model_config(SIGLIP, QWEN), text=text)
        with pytest.raises(ConversionError) as error:
            load_params(folder, config, abstract_params(config))
        assert "config rms_norm_eps: checkpoint 1e-06, model 1e-05" in str(error.value)
        assert "config rope_theta: checkpoint 1000000.0, model 10000.0" in str(error.value)

    def test_fewer_layers_are_not_taken_for_a_cut(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        config = model_config(dataclasses.replace(SIGLIP, num_hidden_layers=1), QWEN)
        with pytest.raises(ConversionError, match="num_hidden_layers: checkpoint 2, model 1"):
            load_params(folder, config, abstract_params(config))

    def test_vocabulary(self, tmp_path):
        folder, tensors, _ = source(tmp_path, SIGLIP, QWEN_UNTIED)
        config = model_config(SIGLIP, dataclasses.replace(QWEN_UNTIED, vocab_size=100))
        abstract = abstract_params(config)
        with pytest.raises(ConversionError) as error:
            load_params(folder, config, abstract)
        assert "set config.model.text.vocab_size=96" in str(error.value)
        assert "--vocab_size 100" in str(error.value)
        params = load_params(folder, config, abstract, pad_vocab=True).params
        head = np.asarray(params["lm_head"]["kernel"])
        np.testing.assert_array_equal(head[:, :96], tensors["lm_head.weight"].T)
        np.testing.assert_allclose(
            head[:, 96:], head[:, :96].mean(1, keepdims=True) * np.ones(4), atol=1e-6
        )

    def test_a_model_that_is_not_of_its_config(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        config = model_config(SIGLIP, QWEN)
        abstract = abstract_params(config)
        abstract["language_model"]["norm"]["weight"] = abstract["language_model"]["norm"].pop(
            "scale"
        )
        with pytest.raises(ConversionError) as error:
            load_params(folder, config, abstract)
        assert "language_model/norm/scale: name map (32,), model None" in str(error.value)
        assert "language_model/norm/weight: unknown to the name map" in str(error.value)
