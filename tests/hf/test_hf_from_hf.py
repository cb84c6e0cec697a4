"""`from-hf`: every layout in, one layout out, not a bit changed, and clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import (
    CLIP,
    LAYOUTS,
    LLAMA,
    QWEN,
    QWEN_UNTIED,
    SIGLIP,
    described,
    original_config,
    read_all,
    same,
    source,
    stored,
    tower_config,
    weights,
    write,
)
from safetensors.numpy import load_file, save_file

import convert
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf

CASES = [
    (layout, vision, text)
    for layout in LAYOUTS
    for vision, text in ((SIGLIP, QWEN), (SIGLIP, QWEN_UNTIED), (CLIP, LLAMA))
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("layout", "vision", "text"), CASES)
def test_byte_equal_from_every_layout(tmp_path, layout, vision, text, dtype):
    folder, tensors, tower = source(tmp_path, vision, text, layout, dtype)
    from_hf(folder, tmp_path / "out", vision=tower)
    found = read_all(tmp_path / "out")
    wanted = stored(tensors, "hub")
    assert set(found) == set(wanted)
    assert all(same(found[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype


def test_output_is_an_input(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN, "memory5", "bfloat16")
    from_hf(folder, tmp_path / "a")
    from_hf(tmp_path / "a", tmp_path / "b")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_in_and_out_equal_one_file(tmp_path):
    one, tensors, _ = source(tmp_path / "one", SIGLIP, QWEN)
    many, _, _ = source(tmp_path / "many", SIGLIP, QWEN, shards=5)
    from_hf(one, tmp_path / "a")
    from_hf(many, tmp_path / "b", max_shard_gb=5e-5)
    assert (tmp_path / "a" / "model.safetensors").is_file()
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "b" / file)
    a, b = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert set(a) == set(b)
    assert all(same(a[n], b[n]) for n in a)


def test_stray_buffers_are_left_out_and_reported(tmp_path):
    folder, tensors, _ = source(tmp_path, CLIP, LLAMA)
    stray = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(10)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file({**stored(tensors, "hub"), **stray}, folder / "model.safetensors")
    report = from_hf(folder, tmp_path / "out")
    assert set(read_all(tmp_path / "out")) == set(stored(tensors, "hub"))
    assert any("2 tensors not part of the model" in note for note in report["notes"])


def test_original_llava15_takes_its_tower_from_a_two_tower_clip(tmp_path):
    tensors = weights(CLIP, LLAMA, newline=False)
    decoder = {n: t for n, t in tensors.items() if not n.startswith("vision_tower.")}
    folder = write(
        tmp_path / "in", stored(decoder, "original"), original_config(LLAMA, "openai/clip-large")
    )
    clip = {
        n.removeprefix("vision_tower."): t
        for n, t in tensors.items()
        if n.startswith("vision_tower")
    }
    two_towers = {f"vision_model.{n}": t for n, t in clip.items()} | {
        "text_model.final_layer_norm.weight": np.ones(3, np.float32),
        "logit_scale": np.array(2.6, np.float32),
        "visual_projection.weight": np.ones((3, 24), np.float32),
    }
    tower = write(
        tmp_path / "clip", two_towers, {"model_type": "clip", "vision_config": tower_config(CLIP)}
    )
    with pytest.raises(ConversionError, match="give its folder with --vision"):
        from_hf(folder, tmp_path / "out")
    report = from_hf(folder, tmp_path / "out", vision=tower)
    found = read_all(tmp_path / "out")
    assert all(same(found[n], t) for n, t in stored(tensors, "hub").items())
    by_part = {c["component"]: c["from"] for c in report["components"]}
    assert by_part["vision_tower"] == [str(tower / "model.safetensors")]
    assert by_part["language_model"] == [str(folder / "model.safetensors")]


def test_a_tower_in_the_checkpoint_wins_over_the_published_one(tmp_path):
    folder, tensors, _ = source(tmp_path, CLIP, LLAMA, "original")
    other = weights(CLIP, LLAMA, newline=False, seed=1)
    clip = {n[len("vision_tower.") :]: t for n, t in other.items() if n.startswith("vision_tower")}
    tower = write(tmp_path / "clip", clip, tower_config(CLIP))
    from_hf(folder, tmp_path / "out", vision=tower)
    found = read_all(tmp_path / "out")
    assert all(same(found[n], t) for n, t in stored(tensors, "hub").items())


def test_named_towers_need_no_description(tmp_path):
    """A LLaVA config that names a well-known tower is understood; here its tensors are missing."""
    tensors = weights(CLIP, LLAMA, newline=False)
    folder = write(
        tmp_path / "in",
        stored(tensors, "original"),
        original_config(LLAMA, "openai/clip-vit-large-patch14-336"),
    )
    with pytest.raises(ConversionError) as error:
        from_hf(folder, tmp_path / "out")
    assert "expected [1024, 3, 14, 14], found [24, 3, 8, 8]" in str(error.value)


def test_layers_behind_the_feature_layer_are_cut_off(tmp_path):
    """A SigLIP with three layers of which the second feeds the projector."""
    folder, tensors, _ = source(tmp_path, described(SIGLIP), QWEN, vision_feature_layer=-2)
    report = from_hf(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 2
    assert config["vision_feature_layer"] == -1
    wanted = {n: t for n, t in stored(tensors, "hub").items() if ".encoder.layers.2." not in n}
    assert set(read_all(tmp_path / "out")) == set(wanted)
    assert any("vision layers from 2 on are not used: 16 tensors" in n for n in report["notes"])


def test_side_files_travel(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    (folder / "pytorch_model.bin").write_bytes(b"not this")
    mean = [0.1, 0.2, 0.3]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
    from_hf(folder, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "conversion.json", "model.safetensors", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    }
    kept = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert kept == {"image_mean": mean}


def test_command_line(tmp_path, capsys):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN, "memory4")
    assert convert.main(["from-hf", str(folder), str(tmp_path / "out"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "vision_tower" in out
    assert "written:" in out
    assert convert.main(["from-hf", str(folder), str(tmp_path / "out"), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "exists and is not empty" in error
    assert len(error.splitlines()) == 1


def test_conversions_need_neither_jax_nor_torch():
    """What keeps their memory small, and lets them run where no accelerator library is."""
    code = (
        "import sys, convert\n"
        "from cli_jax.hf import compose, from_hf, pickles\n"
        "assert not {'jax', 'flax', 'torch', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    root = Path(convert.__file__).parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
