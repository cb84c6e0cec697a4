"""The library itself: its names and shapes, its loading of what we write, and its logits."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
from hf_models import (
    CLIP,
    LAYOUTS,
    LLAMA,
    PINPOINTS,
    QWEN,
    QWEN_UNTIED,
    SIGLIP,
    abstract_params,
    decoder_config,
    described,
    hub_config,
    model_config,
    original_config,
    read_all,
    stored,
    tower_config,
    write,
)
from hf_workdir import random_params, write_workdir
from PIL import Image

import convert
from cli_jax.config import ImageConfig
from cli_jax.experiment import DataConfig
from cli_jax.hf import names
from cli_jax.hf.checkpoint import read
from cli_jax.hf.compose import compose
from cli_jax.hf.config_out import preprocessor_json
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.load import load_params
from cli_jax.hf.to_hf import to_hf
from cli_jax.image.preprocess import make_tiles, normalize

torch = pytest.importorskip("torch", reason="the oracle is transformers on torch")
transformers = pytest.importorskip("transformers")

CASES = [(SIGLIP, QWEN), (SIGLIP, QWEN_UNTIED), (CLIP, LLAMA)]


def model_class(vision):
    kind = "LlavaOnevision" if vision.model_type == "siglip" else "Llava"
    return getattr(transformers, f"{kind}ForConditionalGeneration")


def library_model(vision, text, dtype=torch.float32):
    """A tiny model of the library, every parameter redrawn, norms and biases included."""
    cls = model_class(vision)
    model = cls(cls.config_class(**hub_config(vision, text)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.to(dtype)


def state(model):
    """Parameters by canonical name; a tied head is not a parameter of its own."""
    found = {names.canonical(n): p.detach() for n, p in model.named_parameters()}
    assert None not in found
    return found


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("vision", "text"), CASES)
def test_names_and_shapes_are_the_library_s(vision, text):
    found = {n: tuple(p.shape) for n, p in state(library_model(vision, text)).items()}
    assert found == names.expected(vision, text, has_newline=vision.model_type == "siglip")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vision", "text"), CASES)
def test_library_saves_we_normalize_library_loads(tmp_path, vision, text, dtype):
    model = library_model(vision, text, dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    from_hf(tmp_path / "in", tmp_path / "out")
    loaded, info = model_class(vision).from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = state(model), state(loaded)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert bits(tensor) == bits(after[name]), name
    for key in ("vision_config", "text_config"):
        a, b = (getattr(m.config, key).to_dict() for m in (model, loaded))
        ignored = {"dtype", "architectures", "head_dim", "num_channels", "projection_dim"}
        assert {k: v for k, v in a.items() if k not in ignored} == {
            k: v for k, v in b.items() if k in a and k not in ignored
        }


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "original"])
def test_layouts_of_the_tests_are_the_library_s(tmp_path, layout):
    """Each layout written here is one the library understands: nothing missing, nothing left."""
    model = library_model(SIGLIP, QWEN_UNTIED)
    tensors = {n: p.numpy() for n, p in state(model).items()}
    write(tmp_path / "in", stored(tensors, layout), hub_config(SIGLIP, QWEN_UNTIED))
    loaded, info = model_class(SIGLIP).from_pretrained(tmp_path / "in", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(bits(p) == bits(state(loaded)[n]) for n, p in state(model).items())


@pytest.mark.parametrize("fusion", ["none", "cli"])
@pytest.mark.parametrize(("vision", "text"), CASES)
def test_what_was_trained_loads_in_the_library(tmp_path, vision, text, fusion):
    model = model_config(vision, text, fusion)
    workdir = write_workdir(tmp_path / "run", model, random_params(model))
    to_hf(workdir, tmp_path / "out", image_token_id=90)
    loaded, info = model_class(vision).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = {names.canonical(n): t for n, t in read_all(tmp_path / "out").items()}
    found = state(loaded)
    assert set(found) == set(written)
    assert all(bits(found[n]) == written[n].tobytes() for n in written)
    assert loaded.config.image_token_id == 90
    assert (tmp_path / "out/cli_adapter.json").exists() == (fusion == "cli")
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert hasattr(transformers, processor["image_processor_type"])


@pytest.mark.parametrize(
    "kind", ["SiglipModel", "SiglipVisionModel", "CLIPModel", "CLIPVisionModel"]
)
def test_separate_models_as_the_library_saves_them(tmp_path, kind):
    """One tower or two, tied or untied decoder: everything used is found, byte for byte."""
    clip = kind.startswith("CLIP")
    vision, text = (CLIP, LLAMA) if clip else (described(SIGLIP), QWEN)
    tower, decoder = tower_config(vision), decoder_config(text)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    if kind.endswith("VisionModel"):
        config = getattr(transformers, f"{kind[:-11]}VisionConfig")(**tower)
    else:
        words = {**small, "num_hidden_layers": 1, "vocab_size": 50, "projection_size": 24}
        config_class = getattr(transformers, f"{kind[:-5]}Config")
        config = config_class(vision_config=tower, text_config=words)
    eyes = getattr(transformers, kind)(config)
    family = "Llama" if clip else "Qwen2"
    config = getattr(transformers, f"{family}Config")(**decoder)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    eyes.save_pretrained(tmp_path / "eyes")
    model.save_pretrained(tmp_path / "words")
    compose(tmp_path / "out", vision=tmp_path / "eyes", language=tmp_path / "words")
    found = {names.canonical(n): t for n, t in read_all(tmp_path / "out").items()}
    used = {}
    for source, only_tower in ((eyes, True), (model, False)):
        for name, parameter in source.named_parameters():
            canonical = names.canonical(name, tower=only_tower)
            if canonical and (clip or names.vision_layer(canonical) != 2):
                used[canonical] = parameter.detach()
    assert set(found) == set(used)
    assert all(bits(used[n]) == t.tobytes() for n, t in found.items())


@pytest.mark.parametrize("size", [(40, 31), (28, 28), (90, 33), (17, 80)])
@pytest.mark.parametrize("aspect", ["anyres_max_4", "pad", "crop", "square"])
def test_written_preprocessor_makes_our_pixels(aspect, size):
    """preprocessor_config.json, given to the library's PIL processors, is our preprocessing."""
    pinpoints = PINPOINTS if aspect.startswith("anyres") else ()
    image_config = ImageConfig(aspect, "same", pinpoints, image_mean=(0.3, 0.4, 0.5))
    written = preprocessor_json(SIGLIP, image_config)
    kind = written.pop("image_processor_type")
    module = "llava_onevision" if "Onevision" in kind else "llava"
    library = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(library, f"{kind}Pil")(**written)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    wanted = processor(images=picture, return_tensors="np")["pixel_values"]
    tiles = normalize(make_tiles(picture, image_config, SIGLIP, single=True), image_config)
    wanted = np.reshape(wanted, (-1, *wanted.shape[-3:]))
    assert wanted.shape[0] == len(tiles)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), wanted)


def tiny_tokenizer(folder):
    """Bytes as tokens, plus the template's special tokens, within 96 ids."""
    characters = {chr(c): i for i, c in enumerate([10, *range(32, 110)])}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
    vocabulary = characters | {t: len(characters) + i for i, t in enumerate(special)}
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(special)
    made.save(str(folder / "tokenizer.json"))


def normalized(tmp_path, vision, text):
    """The library's model with well-behaved weights and a tokenizer, through from-hf."""
    model = library_model(vision, text)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.data = parameter.data / 0.3 * parameter[0].numel() ** -0.5
    model.save_pretrained(tmp_path / "in")
    tiny_tokenizer(tmp_path / "in")
    from_hf(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out"


class TestVerify:
    @pytest.fixture(params=CASES, ids=["tied", "untied", "llava"])
    def folder(self, request, tmp_path):
        return normalized(tmp_path, *request.param)

    def test_equal(self, folder, capsys):
        assert convert.main(["verify", str(folder)]) == 0
        out = capsys.readouterr().out
        result = json.loads(out[: out.rindex("}") + 1])
        assert result["error_in_standard_deviations"] < 1e-5
        assert result["compared_positions"] > 20
        assert result["next_token"][0] == result["next_token"][1]

    def test_equal_after_training(self, folder, tmp_path):
        """from-hf -> training state -> to-hf; the adapter beside the base does not matter."""
        checkpoint = read(folder)
        model = model_config(checkpoint.vision, checkpoint.text, "cli")
        params = load_params(folder, model, abstract_params(model)).params
        params["fusion"] = random_params(model)["fusion"]
        data = DataConfig(tokenizer=str(folder))
        workdir = write_workdir(tmp_path / "run", model, params, data=data, init_from=str(folder))
        to_hf(workdir, tmp_path / "trained")
        assert (tmp_path / "trained/cli_adapter.json").is_file()
        assert convert.main(["verify", str(tmp_path / "trained"), "--bound", "1e-5"]) == 0

    def test_a_swapped_pair_of_kernels_is_seen(self, folder, monkeypatch, capsys):
        """Our side reads q as k: what a wrong conversion would do."""
        real = names.leaves

        def swapped(shapes):
            leaves = real(shapes)
            q = leaves["vision_tower/encoder/layers/self_attn/q_proj/kernel"]
            k = leaves["vision_tower/encoder/layers/self_attn/k_proj/kernel"]
            exchanged = {
                q.path: q.__class__(q.path, k.names, q.stacked, q.axes, q.shape),
                k.path: k.__class__(k.path, q.names, k.stacked, k.axes, k.shape),
            }
            return leaves | exchanged

        monkeypatch.setattr(names, "leaves", swapped)
        assert convert.main(["verify", str(folder)]) == 1
        assert "DIFFERENT" in capsys.readouterr().out


def test_one_tile_models_go_out_as_llava(tmp_path):
    """OneVision's first stage: a SigLIP, one squashed tile, a newline nobody uses."""
    folder = normalized(tmp_path, SIGLIP, QWEN)
    model = model_config(SIGLIP, read(folder).text)
    params = load_params(folder, model, abstract_params(model)).params
    model = dataclasses.replace(model, image=ImageConfig("square", "same"))
    workdir = write_workdir(tmp_path / "run", model, params, data=DataConfig(tokenizer=str(folder)))
    report = to_hf(workdir, tmp_path / "trained", vocab_size=128)
    assert any("image_newline is in the file" in note for note in report["notes"])
    config = json.loads((tmp_path / "trained/config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == 96  # the first appended row
    assert convert.main(["verify", str(tmp_path / "trained"), "--bound", "1e-5"]) == 0
    from_hf(tmp_path / "trained", tmp_path / "again")
    assert "image_newline" in read_all(tmp_path / "again")


def test_verify_needs_a_normalized_folder(tmp_path, capsys):
    tensors = {n: p.numpy() for n, p in state(library_model(CLIP, LLAMA)).items()}
    config = original_config(LLAMA, "openai/clip-vit-large-patch14-336")
    write(tmp_path / "in", stored(tensors, "original"), config)
    assert convert.main(["verify", str(tmp_path / "in")]) == 1
    assert "run `convert.py from-hf`" in capsys.readouterr().err
