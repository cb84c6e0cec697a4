"""`compose`: separate towers and decoders, as published, into the start of stage 1."""

import dataclasses
import json

import numpy as np
import pytest
from hf_models import (
    CLIP,
    LLAMA,
    QWEN,
    SIGLIP,
    abstract_params,
    decoder_config,
    described,
    model_config,
    read_all,
    same,
    stored,
    tower_config,
    weights,
    write,
)

import convert
from cli_jax.hf.compose import compose
from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import load_params


def tower(folder, vision, prefix="vision_model.", two_towers=True):
    """A published tower with everything around it; returns its folder and tensors."""
    tensors = weights(vision, LLAMA, newline=False, seed=3)
    tensors = {
        n.removeprefix("vision_tower."): t
        for n, t in tensors.items()
        if n.startswith("vision_tower")
    }
    around = {
        f"{prefix}head.probe": np.ones((1, 1, 24), np.float32),
        f"{prefix}head.mlp.fc1.weight": np.ones((4, 24), np.float32),
    }
    config = tower_config(vision)
    if two_towers:
        around |= {
            "text_model.encoder.layers.0.mlp.fc1.weight": np.ones((4, 4), np.float32),
            "logit_scale": np.ones(1, np.float32),
            "logit_bias": np.ones(1, np.float32),
        }
        config = {"model_type": vision.model_type, "vision_config": config, "text_config": {}}
    everything = {f"{prefix}{n}": t for n, t in tensors.items()} | around
    return write(folder, everything, config), tensors


def decoder(folder, text, dtype="bfloat16"):
    """A published language model."""
    tensors = weights(SIGLIP, text, newline=False, dtype=dtype, seed=4)
    tensors = {n: t for n, t in tensors.items() if n.startswith(("language_model", "lm_head"))}
    return write(folder, stored(tensors, "original"), decoder_config(text)), tensors


@pytest.mark.parametrize(
    ("prefix", "two_towers"), [("vision_model.", True), ("vision_model.", False), ("", False)]
)
@pytest.mark.parametrize(("vision", "text"), [(SIGLIP, QWEN), (CLIP, LLAMA)])
def test_towers_as_published(tmp_path, vision, text, prefix, two_towers):
    eyes, eye_tensors = tower(tmp_path / "v", described(vision), prefix, two_towers)
    words, word_tensors = decoder(tmp_path / "l", text)
    (words / "tokenizer.json").write_text("{}")
    report = compose(tmp_path / "out", vision=eyes, language=words)
    used = {
        f"vision_tower.{n}": t
        for n, t in eye_tensors.items()
        if vision.model_type == "clip" or "layers.2." not in n
    }
    wanted = stored(used | word_tensors, "hub")
    found = read_all(tmp_path / "out")
    assert set(found) == set(wanted)
    assert all(same(found[n], wanted[n]) for n in wanted)
    assert (tmp_path / "out/tokenizer.json").is_file()
    projector = ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias"]
    projector += [n.replace("_1", "_2") for n in projector]
    newline = ["image_newline"] if vision.model_type == "siglip" else []
    assert report["initialize"] == projector + newline
    assert report == json.loads((tmp_path / "out/conversion.json").read_text())
    by_part = {c["component"]: c for c in report["components"]}
    assert by_part["vision_tower"]["from"] == [str(eyes / "model.safetensors")]
    assert by_part["vision_tower"]["dtype"] == "float32"
    assert by_part["language_model"]["dtype"] == "bfloat16"

    model = model_config(vision, text)
    loaded = load_params(tmp_path / "out", model, abstract_params(model))
    assert set(loaded.missing) == {
        *(f"multi_modal_projector/linear_{i}/{k}" for i in (1, 2) for k in ("kernel", "bias")),
        *newline,
    }


@pytest.mark.parametrize("naming", ["original", "hub"])
def test_a_projector_of_stage_1(tmp_path, naming):
    eyes, _ = tower(tmp_path / "v", described(SIGLIP))
    words, _ = decoder(tmp_path / "l", QWEN)
    all_ = weights(SIGLIP, QWEN, newline=True, seed=9)
    linear = {n: t for n, t in all_.items() if n.startswith("multi_modal")}
    file = write(tmp_path / "p", stored(linear, naming), None) / "model.safetensors"
    report = compose(tmp_path / "out", vision=eyes, language=words, projector=file)
    assert report["initialize"] == ["image_newline"]
    found = read_all(tmp_path / "out")
    assert all(same(found[n], t) for n, t in linear.items())
    del linear["multi_modal_projector.linear_2.bias"]
    file = write(tmp_path / "p2", stored(linear, naming), None) / "model.safetensors"
    with pytest.raises(ConversionError, match=r"missing multi_modal_projector\.linear_2\.bias"):
        compose(tmp_path / "out2", vision=eyes, language=words, projector=file)


def test_layers_can_be_kept(tmp_path):
    eyes, _ = tower(tmp_path / "v", described(SIGLIP))
    words, _ = decoder(tmp_path / "l", QWEN)
    compose(tmp_path / "out", vision=eyes, language=words, vision_layers=3)
    whole = model_config(dataclasses.replace(SIGLIP, num_hidden_layers=3), QWEN)
    assert load_params(tmp_path / "out", whole, abstract_params(whole)).params


def test_what_does_not_fit_is_listed(tmp_path):
    eyes, _ = tower(tmp_path / "v", described(SIGLIP))
    words, _ = decoder(tmp_path / "l", QWEN)
    wide = dataclasses.replace(QWEN, intermediate_size=50)
    (words / "config.json").write_text(json.dumps(decoder_config(wide)))
    with pytest.raises(ConversionError) as error:
        compose(tmp_path / "out", vision=eyes, language=words)
    expected = (
        "wrong   language_model.layers.1.mlp.down_proj.weight: expected [32, 50], found [32, 48]"
    )
    assert expected in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConversionError, match="language models of type 'siglip'"):
        compose(tmp_path / "out", vision=eyes, language=eyes)


def test_command_line_shows_the_table(tmp_path, capsys):
    eyes, _ = tower(tmp_path / "v", CLIP)
    words, _ = decoder(tmp_path / "l", LLAMA)
    arguments = ["compose", str(tmp_path / "out"), "--vision", str(eyes), "--language", str(words)]
    assert convert.main([*arguments, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"{eyes / 'model.safetensors'}" in out
    assert "multi_modal_projector.linear_1.weight" in out
    assert "initialized at the start" in out
