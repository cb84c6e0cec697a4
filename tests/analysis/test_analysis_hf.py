"""Hugging Face folders are asked and looked into like workdirs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.evaluate.workdir import open_run
from cli_jax.experiment import ConfigError
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.to_hf import to_hf
from cli_jax.image.preprocess import normalize
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small
from tests.hf import hf_models

VISION = {"siglip": hf_models.SIGLIP, "clip": hf_models.CLIP}
TEXT = {
    "siglip": dataclasses.replace(hf_models.QWEN, vocab_size=128),
    "clip": dataclasses.replace(hf_models.LLAMA, vocab_size=128),
}
IMAGE_TOKEN = 120


def save_checkpoint(folder, family, without=()):
    """LlavaOnevision or Llava as the hub has them, every parameter redrawn, with a tokenizer."""
    vision, text = VISION[family], TEXT[family]
    tensors = hf_models.weights(vision, text, newline=family == "siglip")
    tensors = {n: x / np.sqrt(x[0].size if x.ndim > 1 else 4) for n, x in tensors.items()}
    kept = {n: np.float32(x) for n, x in tensors.items() if n not in without}
    config = hf_models.hub_config(vision, text, image_token_index=IMAGE_TOKEN)
    hf_models.write(folder, hf_models.stored(kept, "hub"), config)
    small.save_tokenizer(folder, () if family == "siglip" else ("<s>", "</s>"))
    return folder


def analyze(command, checkpoint, folder, *more):
    options = ["--workdir", checkpoint, "--data", folder / "questions.json", "--output", folder]
    return small.load_command("analyze").main([command, *map(str, options), *more])


def transformers_view(checkpoint, folder):
    """Mean mass [n, H], and summed cosines of the tower's layers, by the library."""
    torch = pytest.importorskip("torch")
    import transformers

    run = open_run(checkpoint)
    assert (
        run.experiment.data.template
        == {"qwen2": "qwen_1_5", "llama": "v1"}[run.experiment.model.text.model_type]
    )
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    spec = prompt_spec(run.experiment, load_tokenizer(str(checkpoint)), 0)
    questions = read_questions(folder / "questions.json")
    masses, cosines = [], []
    for _, sample in load_prompts(questions, str(folder), spec):
        ids = sample.ids.astype(np.int64)
        ids[sample.visual_position] = IMAGE_TOKEN
        tiles = torch.from_numpy(normalize(sample.tiles, spec.image).transpose(0, 3, 1, 2))
        inputs = {"input_ids": torch.from_numpy(ids)[None], "pixel_values": tiles}
        if "onevision" in model.config.model_type:
            sizes = torch.tensor([[9, 14]])  # height, width of the pictures
            inputs |= {"pixel_values": tiles[None], "image_sizes": sizes}
        with torch.no_grad():
            seen = model(**inputs, output_attentions=True).attentions
            states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
        last = sample.visual_position[-1]
        weights = np.float64([layer[0].numpy() for layer in seen])
        masses.append(weights[:, :, last + 1 :][..., sample.visual_position].sum(-1).mean(-1))
        states = np.float64([x.numpy() for x in states])
        states = states[:, :, -spec.vision.num_patches :]  # CLIP's class token is the first
        unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
        cosines.append(np.einsum("etnv,ftnv->eft", unit, unit) / states.shape[2])
    return np.mean(masses, axis=0), np.concatenate(cosines, axis=-1).mean(axis=-1)


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_a_converted_folder_is_looked_into(tmp_path, capsys, family):
    """from-hf, then both analyses, against the library on the same folder."""
    small.save_questions(tmp_path, 2)
    source = save_checkpoint(tmp_path / "hub", family)
    from_hf(source, tmp_path / "converted")
    assert analyze("attention", tmp_path / "converted", tmp_path, "--per_head") == 0
    assert analyze("layers", tmp_path / "converted", tmp_path, "--groups", "2") == 0
    printed = capsys.readouterr().out
    assert ("3..3 nothing" in printed) == (family == "clip")  # its last block is not used
    mass, similarity = transformers_view(tmp_path / "converted", tmp_path)
    with np.load(tmp_path / "attention.npz") as found:
        assert found["mass_per_head"] == pytest.approx(mass, abs=1e-5)
    with np.load(tmp_path / "layers.npz") as found:
        assert found["similarity"] == pytest.approx(similarity, abs=1e-5)


def test_a_folder_of_the_hub_needs_no_conversion(tmp_path):
    source = save_checkpoint(tmp_path / "hub", "siglip")
    from_hf(source, tmp_path / "converted")
    one, other = open_run(source), open_run(tmp_path / "converted")
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert (one.experiment.name, one.step) == ("hub", 0)
    assert one.experiment.data.template == "qwen_1_5"
    assert one.experiment.model == other.experiment.model


def test_an_adapter_brings_its_strategy(tmp_path):
    """A workdir of cli, written for transformers, is opened as the model that it was."""
    experiment = small.make_experiment(tmp_path, gate="channel", context="prompt")
    _, params = small.make_model(experiment)
    workdir = small.save_workdir(tmp_path / "run", experiment, params)
    to_hf(workdir, tmp_path / "out", image_token_id=90)
    run = open_run(tmp_path / "out")
    assert run.experiment.model.fusion == experiment.model.fusion
    assert run.model.config.fusion_name == "cli"
    jax.tree.map(np.testing.assert_array_equal, run.params, params)


def test_what_cannot_be_opened_is_a_clear_error(tmp_path):
    source = save_checkpoint(tmp_path / "hub", "siglip", without=("image_newline",))
    with pytest.raises(ConversionError, match="leaves image_newline to be trained"):
        open_run(source)
    with pytest.raises(ConfigError, match="has no steps"):
        open_run(source, step=3)
    (source / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConversionError, match="'bert' model, not a LLaVA model"):
        open_run(source)
