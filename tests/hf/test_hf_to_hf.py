"""`to-hf`: what training left, under the names of transformers, and an adapter beside it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax.traverse_util import flatten_dict
from hf_models import (
    CLIP,
    LLAMA,
    QWEN,
    QWEN_UNTIED,
    SIGLIP,
    abstract_params,
    model_config,
    read_all,
    same,
    source,
    stored,
)
from hf_workdir import random_params, write_workdir
from safetensors.numpy import load_file, save_file

import convert
from cli_jax.experiment import DataConfig
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.load import load_params
from cli_jax.hf.to_hf import to_hf
from cli_jax.hf.workdir import StoredArray, open_workdir
from cli_jax.train.checkpoint import load_params as load_checkpoint_params


def same_params(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return set(a) == set(b) and all(same(np.asarray(a[p]), np.asarray(b[p])) for p in a)


@pytest.mark.parametrize(
    ("vision", "text", "dtype"),
    [
        (SIGLIP, QWEN, "bfloat16"),
        (SIGLIP, QWEN_UNTIED, "float16"),
        (CLIP, LLAMA, "float32"),
    ],
)
def test_base_weights_survive_byte_equal(tmp_path, vision, text, dtype):
    """from-hf -> float32 training state -> to-hf gives every byte back."""
    folder, tensors, _ = source(tmp_path, vision, text, "memory5", dtype, shards=2)
    from_hf(folder, tmp_path / "base")
    model = model_config(vision, text)
    params = load_params(tmp_path / "base", model, abstract_params(model)).params
    workdir = write_workdir(tmp_path / "run", model, params, init_from=str(tmp_path / "base"))
    report = to_hf(workdir, tmp_path / "out", dtype=dtype, max_shard_gb=2e-5)
    found, wanted = read_all(tmp_path / "out"), stored(tensors, "hub")
    assert set(found) == set(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not any("precision" in note for note in report["notes"])
    a, b = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("base", "out"))
    assert a == b


def test_memory_dtype_is_kept_by_default(tmp_path):
    model = model_config(SIGLIP, QWEN)
    params = random_params(model)
    params["image_newline"] = params["image_newline"].astype(jnp.bfloat16)
    workdir = write_workdir(tmp_path / "run", model, params)
    to_hf(workdir, tmp_path / "out", image_token_id=90)
    found = read_all(tmp_path / "out")
    assert found["image_newline"].dtype == ml_dtypes.bfloat16
    assert found["language_model.model.norm.weight"].dtype == np.float32
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


def test_lost_precision_is_reported_and_overflow_refused(tmp_path):
    model = model_config(SIGLIP, QWEN)
    params = random_params(model)
    workdir = write_workdir(tmp_path / "run", model, params)
    report = to_hf(workdir, tmp_path / "out", image_token_id=90, dtype="bfloat16")
    assert any("tensors lost precision in bfloat16" in note for note in report["notes"])
    params["image_newline"] = params["image_newline"].at[3].set(1e5)
    workdir = write_workdir(tmp_path / "run2", model, params)
    with pytest.raises(ConversionError, match="image_newline has values that float16 cannot hold"):
        to_hf(workdir, tmp_path / "out2", image_token_id=90, dtype="float16")
    assert not list(tmp_path.glob("out2*"))


def test_steps(tmp_path):
    model = model_config(SIGLIP, QWEN)
    for step, seed in ((3, 0), (12, 1)):
        write_workdir(tmp_path / "run", model, random_params(model, seed), step)
    assert open_workdir(tmp_path / "run").step == 12
    assert open_workdir(tmp_path / "run", 3).step == 3
    at = open_workdir(tmp_path / "run/checkpoints/3")
    assert at.step == 3
    newline = at.arrays["image_newline"].read((slice(None),))
    np.testing.assert_array_equal(newline, random_params(model, 0)["image_newline"])
    with pytest.raises(Exception, match="no checkpoint 4"):
        open_workdir(tmp_path / "run", 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_bit_is_noticed(tmp_path, dtype, monkeypatch):
    """Our checksum is training's, and to-hf compares it."""
    monkeypatch.setattr("cli_jax.train.pieces.PIECE_BYTES", 2048)
    monkeypatch.setattr("cli_jax.hf.workdir._PART", 100)
    model = model_config(SIGLIP, QWEN)
    workdir = write_workdir(tmp_path / "run", model, random_params(model, dtype=dtype))
    checkpoint = open_workdir(workdir)
    assert all(checkpoint.arrays[p].checksum() == n for p, n in checkpoint.checksums.items())
    metadata = workdir / "checkpoints/3/metadata/metadata"
    saved = json.loads(metadata.read_text())
    saved["arrays"]["params/language_model/layers/mlp/up_proj/kernel"]["checksum"] ^= 1
    metadata.write_text(json.dumps(saved))
    with pytest.raises(ConversionError, match="is damaged: language_model/layers/mlp/up_proj"):
        to_hf(workdir, tmp_path / "out", image_token_id=90)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_one_line(tmp_path):
    model = model_config(SIGLIP, QWEN)
    workdir = write_workdir(tmp_path / "run", model, random_params(model))
    for file in (workdir / "checkpoints/3/params").rglob("d/*"):
        file.unlink()
    with pytest.raises(ConversionError, match="the checkpoint is damaged") as error:
        to_hf(workdir, tmp_path / "out", image_token_id=90)
    assert len(str(error.value).splitlines()) == 1


def test_boxes_of_a_stored_array(tmp_path):
    """Layers, panels and rows, in and out of order, cached or not."""
    model = model_config(SIGLIP, QWEN)
    params = flatten_dict(random_params(model), sep="/")
    workdir = write_workdir(tmp_path / "run", model, random_params(model))
    arrays = open_workdir(workdir).arrays
    assert {p: a.shape for p, a in arrays.items()} == {p: x.shape for p, x in params.items()}
    kernel, bias = "language_model/layers/mlp/up_proj/kernel", "vision_tower/post_layernorm/bias"
    all_ = slice(None)
    for path, index in (
        (kernel, (1, all_, slice(3, 9))),
        (bias, (slice(2, 5),)),
        (kernel, (1, slice(0, 7), all_)),
        (kernel, (0, all_, all_)),
        (kernel, (slice(0, 2), slice(5, 6), slice(0, 48))),
        (bias, (all_,)),
    ):
        np.testing.assert_array_equal(arrays[path].read(index), np.asarray(params[path])[index])


def test_large_arrays_are_stored_in_pieces_and_layers_apart(tmp_path, monkeypatch):
    """What lets to-hf read one layer at a time; the result is the same."""
    model = model_config(SIGLIP, QWEN)
    params = random_params(model)
    whole = write_workdir(tmp_path / "whole", model, params)
    monkeypatch.setattr("cli_jax.train.pieces.PIECE_BYTES", 2048)
    cut = write_workdir(tmp_path / "cut", model, params)
    kernel, table = (
        "language_model/layers/mlp/up_proj/kernel",
        "language_model/embed_tokens/embedding",
    )
    chunks = {}
    for workdir in (whole, cut):
        arrays = open_workdir(workdir).arrays
        chunks[workdir] = [arrays[path].chunk for path in (kernel, table)]
        to_hf(workdir, tmp_path / f"out_{workdir.name}", image_token_id=90)
    assert chunks[whole] == [(2, 32, 48), (96, 32)]
    assert all(np.prod(chunk) * 4 <= 2048 for chunk in chunks[cut])
    assert chunks[cut][0][0] == 1
    a, b = read_all(tmp_path / "out_whole"), read_all(tmp_path / "out_cut")
    assert set(a) == set(b)
    assert all(same(a[name], b[name]) for name in a)
    restored = load_checkpoint_params(cut)
    assert same_params(restored, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_boxes_of_an_array_in_many_chunks(dtype):
    """Any box, and never more than its own chunks in memory."""
    rng = np.random.default_rng(0)
    array = rng.standard_normal((5, 7, 9), np.float32).astype(jnp.dtype(dtype))
    metadata = {"chunks": [1, 4, 9]}
    store = ts.open(
        {"driver": "zarr", "kvstore": "memory://", "metadata": metadata},
        create=True,
        dtype=dtype,
        shape=array.shape,
    ).result()
    store.write(array).result()
    last = {}
    arrays = [StoredArray(name, store, last) for name in ("a", "b")]
    for _ in range(60):
        ends = [sorted(rng.choice(n + 1, 2, replace=False).tolist()) for n in array.shape]
        index = tuple(slice(*e) if rng.random() < 0.7 else e[0] for e in ends)
        found = arrays[rng.integers(2)].read(index)
        assert same(np.ascontiguousarray(found), np.ascontiguousarray(array[index]))
        ((box, held),) = last.values()
        assert held.shape == tuple(high - low for low, high in box)
        layers = 1 if isinstance(index[0], int) else index[0].stop - index[0].start
        assert held.shape[0] == layers


class TestAdapter:
    """A CLI model on a base: shared alone, joined again, and refused on any other base."""

    @pytest.fixture
    def run(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN, "hub", "bfloat16")
        model = model_config(SIGLIP, QWEN, "cli")
        loaded = load_params(folder, model, abstract_params(model))
        params = loaded.params | {"fusion": random_params(model, 5)["fusion"]}
        workdir = write_workdir(tmp_path / "run", model, params, init_from=str(folder))
        return folder, model, params, workdir

    def test_full_output_loads_back(self, tmp_path, run):
        _, model, params, workdir = run
        to_hf(workdir, tmp_path / "out", dtype="bfloat16")
        loaded = load_params(tmp_path / "out", model, abstract_params(model))
        assert loaded.missing == ()
        assert same_params(loaded.params, params)

    def test_adapter_alone_joins_its_base(self, tmp_path, run):
        folder, model, params, workdir = run
        to_hf(workdir, tmp_path / "adapter", adapter_only=True)
        assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
            *("cli_adapter.safetensors", "cli_adapter.json", "conversion.json"),
        }
        from_hf(folder, tmp_path / "out", adapter=tmp_path / "adapter")
        loaded = load_params(tmp_path / "out", model, abstract_params(model))
        assert same_params(loaded.params, params)
        from_hf(tmp_path / "out", tmp_path / "again")  # an adapter next to its base travels along
        assert (tmp_path / "again/cli_adapter.safetensors").read_bytes() == (
            tmp_path / "adapter/cli_adapter.safetensors"
        ).read_bytes()

    def test_another_base_is_refused_by_both_fingerprints(self, tmp_path, run):
        _, _, _, workdir = run
        to_hf(workdir, tmp_path / "adapter", adapter_only=True)
        config = json.loads((tmp_path / "adapter/cli_adapter.json").read_text())
        other, tensors, _ = source(tmp_path / "other", SIGLIP, QWEN, "hub", "bfloat16")
        from_hf(other, tmp_path / "fine", adapter=tmp_path / "adapter")  # same values: same base
        tensors["vision_tower.post_layernorm.bias"][0] += 1  # the least used parameter there is
        save_file(stored(tensors, "hub"), other / "model.safetensors")
        with pytest.raises(ConversionError) as error:
            from_hf(other, tmp_path / "out", adapter=tmp_path / "adapter")
        assert config["base_fingerprint"] in str(error.value)
        assert str(error.value).count("sha256:") == 2

    def test_loading_it_on_a_changed_base_is_refused(self, tmp_path, run):
        folder, model, _, workdir = run
        to_hf(workdir, tmp_path / "out", dtype="bfloat16")
        (tmp_path / "out/model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()
        )
        load_params(tmp_path / "out", model, abstract_params(model))  # the same base by value
        other, _, _ = source(tmp_path / "other", SIGLIP, QWEN_UNTIED, "hub", "bfloat16")
        untied = dataclasses.replace(model, text=QWEN_UNTIED)
        for name in ("cli_adapter.safetensors", "cli_adapter.json"):
            (other / name).write_bytes((tmp_path / "out" / name).read_bytes())
        with pytest.raises(ConversionError, match="belongs to the base model"):
            load_params(other, untied, abstract_params(untied))

    def test_another_strategy_or_config_is_refused(self, tmp_path, run):
        _, model, _, workdir = run
        to_hf(workdir, tmp_path / "out")
        none = model_config(SIGLIP, QWEN)
        with pytest.raises(ConversionError, match="name=cli, the model has none"):
            load_params(tmp_path / "out", none, abstract_params(none))
        changed = dataclasses.replace(
            model, fusion=dataclasses.replace(model.fusion, gate_bias_init=-1.0)
        )
        with pytest.raises(ConversionError, match=r"gate_bias_init: adapter -2\.0, model -1\.0"):
            load_params(tmp_path / "out", changed, abstract_params(changed))

    def test_half_an_adapter_or_other_tensors_are_refused(self, tmp_path, run):
        _, model, _, workdir = run
        to_hf(workdir, tmp_path / "out")
        file = tmp_path / "out/cli_adapter.safetensors"
        tensors = load_file(file)
        name = next(iter(tensors))
        save_file({"fusion.extra": tensors.pop(name), **tensors}, file)
        with pytest.raises(ConversionError) as error:
            load_params(tmp_path / "out", model, abstract_params(model))
        assert f"missing {name.replace('.', '/')}" in str(error.value)
        assert "extra   fusion/extra" in str(error.value)
        file.unlink()
        with pytest.raises(ConversionError, match=r"cli_adapter\.safetensors is missing"):
            load_params(tmp_path / "out", model, abstract_params(model))

    def test_no_adapter_without_parameters(self, tmp_path):
        model = model_config(SIGLIP, QWEN)
        workdir = write_workdir(tmp_path / "run", model, random_params(model))
        with pytest.raises(ConversionError, match="nothing to share"):
            to_hf(workdir, tmp_path / "out", adapter_only=True)
        assert not (tmp_path / "out").exists()


def test_vocabulary_and_image_token(tmp_path):
    model = model_config(SIGLIP, QWEN_UNTIED)
    workdir = write_workdir(tmp_path / "run", model, random_params(model))
    with pytest.raises(ConversionError, match="has no row in a vocabulary of 96"):
        to_hf(workdir, tmp_path / "out")
    with pytest.raises(ConversionError, match="the model has 96 rows"):
        to_hf(workdir, tmp_path / "out", vocab_size=64)
    to_hf(workdir, tmp_path / "out", vocab_size=128, image_token_id=127)
    found = read_all(tmp_path / "out")
    assert found["language_model.lm_head.weight"].shape == (128, 32)
    assert found["language_model.model.embed_tokens.weight"].shape == (128, 32)


def test_tokenizer_files_come_from_the_run(tmp_path):
    model = model_config(SIGLIP, QWEN)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    data = DataConfig(tokenizer=str(tmp_path / "tok"))
    workdir = write_workdir(tmp_path / "run", model, random_params(model), data=data)
    report = to_hf(workdir, tmp_path / "out", image_token_id=90)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert not any("tokenizer" in note for note in report["notes"])
    workdir = write_workdir(tmp_path / "run2", model, random_params(model))
    report = to_hf(workdir, tmp_path / "out2", image_token_id=90)
    assert any("no tokenizer files copied" in note for note in report["notes"])
    to_hf(workdir, tmp_path / "out3", image_token_id=90, tokenizer=tmp_path / "tok")
    assert (tmp_path / "out3/tokenizer.json").is_file()


def test_command_line(tmp_path, capsys):
    model = model_config(SIGLIP, QWEN)
    workdir = str(write_workdir(tmp_path / "run", model, random_params(model)))
    out = str(tmp_path / "out")
    assert convert.main(["to-hf", workdir, out, "--quiet", "--image_token_id", "90"]) == 0
    assert convert.main(["to-hf", workdir, out, "--quiet", "--step", "77"]) == 1
    assert "no checkpoint 77" in capsys.readouterr().err
    assert convert.main(["to-hf", str(tmp_path / "empty"), out]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
    assert jax.default_backend() == "cpu"
