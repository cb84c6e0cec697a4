"""Every config file builds, its shapes hold what they must, its docstring says how to run it."""

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import pytest

from cli_jax import experiment as experiment_lib
from cli_jax.compare.config import from_config as comparison_of
from cli_jax.data.collate import Sizes
from cli_jax.experiment import ConfigError
from cli_jax.fusion import registry
from cli_jax.image.anyres import layout, layout_size, treatment
from cli_jax.text import check_vocabulary, load_tokenizer
from cli_jax.train.optimizer import assign_rates

ROOT = Path(__file__).parents[2]
# not configs themselves
PARTS = {"__init__", "common", "models", "onevision", "llava15", "small", "arms"}
FILES = sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - PARTS)
COMPARISONS = [name for name in FILES if name.startswith("compare_")]
NAMES = [name for name in FILES if name not in COMPARISONS]
FULL = [name for name in NAMES if name.startswith(("ov", "llava15_7b"))]
SMALL = [name for name in NAMES if name not in FULL]


@pytest.fixture(autouse=True)
def repository_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(f"configs.{name}")


def built(name):
    config = module(name).get_config()
    config.lock()
    return experiment_lib.from_dict(config)


def test_the_promised_configs_exist():
    assert {"quickstart", "nlvr_counts", "meter_digits"} <= set(SMALL)
    for model in ("ov0p5b", "ov7b", "llava15_7b"):
        assert {f"{model}_{kind}" for kind in ("cli", "baseline", "stage1")} <= set(FULL)


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_survives_json(name):
    experiment = built(name)
    assert experiment.name == name
    assert experiment_lib.from_dict(experiment_lib.to_dict(experiment)) == experiment


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_build(name, tmp_path):
    config = module(name).get_config()
    config.lock()
    comparison = comparison_of(config, tmp_path)
    assert comparison.base.name == name
    for arm in comparison.settings.arms:
        model = comparison.experiment(arm.name, comparison.settings.stage2).model
        registry.of(model).vision_layers(model.fusion, model.vision)
        registry.of(model).decoder_layers(model.fusion, model.text)
    assert comparison_of(comparison.raw, tmp_path) == comparison


@pytest.mark.parametrize("name", FILES)
def test_docstring_says_how_to_run_it(name):
    text = module(name).__doc__
    command = "analyze.py compare" if name in COMPARISONS else "train.py"
    folder = "output" if name in COMPARISONS else "workdir"
    assert f"python {command} --config configs/{name}.py --{folder} runs/" in text
    for heading in ("Hardware:", "Time:", "Expected result:"):
        assert len(re.findall(f"^{heading} \\S", text, re.MULTILINE)) == 1, heading


@pytest.mark.parametrize("name", NAMES)
def test_shapes_hold_every_picture(name):
    experiment = built(name)
    data, image, vision = experiment.data, experiment.model.image, experiment.model.vision
    tokens, tiles = largest_picture(image, vision)
    assert tokens <= data.visual_per_row < data.row_length
    assert tiles <= data.tiles_per_row
    assert data.images_per_row >= 1


def largest_picture(image, vision):
    """Most tokens and most tiles over pictures of all sizes that reach every layout of a config."""
    if treatment(image, single=True).kind != "anyres":
        found = layout(64, 64, image, vision, single=True)
        return found.num_tokens, found.num_tiles
    tokens = tiles = 0
    for height, width in image.grid_pinpoints:
        for i in range(24):  # from filling the tiles to one patch short of one tile fewer
            cut = i * vision.image_size // 24
            for w, h in ((width - cut, height), (width, height - cut)):
                found = layout(max(w, 8), max(h, 8), image, vision, single=True)
                tokens, tiles = max(tokens, found.num_tokens), max(tiles, found.num_tiles)
    return tokens, tiles


def test_the_largest_onevision_picture():
    experiment = built("ov0p5b_cli")
    tokens, tiles = largest_picture(experiment.model.image, experiment.model.vision)
    assert 8500 < tokens <= 8829 <= experiment.data.visual_per_row
    assert tiles == 37 <= experiment.data.tiles_per_row


@pytest.mark.parametrize("name", SMALL)
def test_small_models_fit_the_demo_tokenizer(name):
    experiment = built(name)
    tokenizer = load_tokenizer(experiment.data.tokenizer)
    check_vocabulary(tokenizer, experiment.model.text.vocab_size)
    assert experiment.model.text.vocab_size < tokenizer.max_id + 64


@pytest.mark.parametrize("name", NAMES)
def test_heads_divide_widths(name):
    model = built(name).model
    assert model.vision.hidden_size % model.vision.num_attention_heads == 0
    assert model.text.num_attention_heads % model.text.num_key_value_heads == 0
    strategy = registry.of(model)
    assert strategy.vision_layers(model.fusion, model.vision)[-1] == model.vision.last_layer
    strategy.decoder_layers(model.fusion, model.text)


PATHS = (
    "vision_tower/embeddings/patch_embedding/kernel",
    "multi_modal_projector/linear_1/kernel",
    "language_model/norm/scale",
    "image_newline",
    "fusion/amp/lora_A",
    "fusion/agf/gate_bias",
)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("ov0p5b_cli", (2e-6, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5)),
        ("ov7b_baseline", (2e-6, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5)),
        ("ov7b_stage1", (None, 1e-3, None, None, 1e-3, 1e-3)),
        ("ov7b_cli_adapter", (None, None, None, None, 1e-4, 1e-4)),
        ("llava15_7b_cli", (None, 2e-5, 2e-5, 2e-5, 2e-5, 2e-5)),
        ("llava15_7b_stage1", (None, 1e-3, None, None, 1e-3, 1e-3)),
    ],
)
def test_what_is_trained_at_which_rate(name, rates):
    assert assign_rates(PATHS, built(name).optimizer) == dict(zip(PATHS, rates, strict=True))


def test_recipes_follow_the_references():
    onevision, llava = built("ov7b_cli"), built("llava15_7b_cli")
    for experiment in (onevision, llava):
        assert experiment.optimizer.warmup_ratio == 0.03
        assert experiment.optimizer.weight_decay == 0.0
        assert experiment.optimizer.schedule == "cosine"
        assert experiment.data.labels == "reference"
        assert experiment.compute.dtype == "bfloat16"
    assert (onevision.optimizer.clip_norm, llava.optimizer.clip_norm) == (1.0, 0.0)
    assert (onevision.data.template, llava.data.template) == ("qwen_1_5", "v1")
    assert (onevision.model.has_newline, llava.model.has_newline) == (True, False)
    assert len(onevision.model.image.grid_pinpoints) == 36
    for name, template in (("ov0p5b_stage1", "plain"), ("llava15_7b_stage1", "plain")):
        assert built(name).data.template == template
    assert built("ov7b_stage1").model.image.aspect_ratio == "square"
    assert built("llava15_7b_stage1").model.image.aspect_ratio == "crop"


@pytest.mark.parametrize("model", ["ov0p5b", "ov7b", "llava15_7b"])
def test_a_baseline_differs_in_its_strategy_only(model):
    cli, none = built(f"{model}_cli"), built(f"{model}_baseline")
    assert (cli.model.fusion_name, none.model.fusion_name) == ("cli", "none")
    none = dataclasses.replace(
        none,
        name=cli.name,
        model=dataclasses.replace(none.model, fusion_name="cli", fusion=cli.model.fusion),
    )
    assert none == cli


def test_every_setting_can_be_given_on_the_command_line():
    """Nothing of an experiment is missing from the config, so flags reach all of it."""
    config = module("ov7b_cli").get_config().to_dict()
    resolved = experiment_lib.to_dict(built("ov7b_cli"))
    resolved["fusion"] |= {k: config["fusion"][k] for k in config["fusion"]}

    def keys(tree, at=""):
        for key, value in tree.items():
            yield f"{at}{key}"
            if isinstance(value, dict):
                yield from keys(value, f"{at}{key}.")

    assert set(keys(config)) == set(keys(resolved))
    assert set(config["fusion"]) == {"name", *registry.STRATEGIES}


def test_layer_lists_and_words_are_both_accepted():
    config = module("ov7b_cli").get_config()
    config.lock()
    for taps in ("every:2", "all", (3, 14, 26)):
        config.fusion.cli.taps = taps
        assert experiment_lib.from_dict(config).model.fusion.taps == taps


@pytest.mark.parametrize("strategy", sorted(registry.STRATEGIES))
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("pretrain")])
def test_every_strategy_can_take_the_place_of_another(name, strategy):
    """With `--config.fusion.name` alone: its layers exist and its pictures have room."""
    config = module(name).get_config()
    config.lock()
    config.fusion.name = strategy
    if name == "llava15_7b_dpvr" and strategy in ("cli", "adapter"):  # these inject everywhere
        with pytest.raises(ConfigError, match="inject before layer 18"):
            experiment_lib.from_dict(config)
        config.fusion[strategy].inject = (0, 6, 12)
    experiment = experiment_lib.from_dict(config)
    model, cls = experiment.model, registry.get(strategy)
    assert cls.vision_layers(model.fusion, model.vision)[-1] <= model.vision.num_hidden_layers
    cls.decoder_layers(model.fusion, model.text)
    room = Sizes.from_config(experiment.data, model.vision, 1, experiment.extras).row
    how = {"single": True, "extras": experiment.extras}
    tiles, tokens = layout_size(400, 100, model.image, model.vision, **how)
    assert tiles <= room.tiles
    assert tokens <= room.visual


def test_a_misspelled_key_is_refused():
    config = module("quickstart").get_config()
    config.optimizer.unlock()
    config.optimizer.lrr = 1.0
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lrr; did you mean 'lr'"):
        experiment_lib.from_dict(config)


def test_configs_need_no_device(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a config must not touch a device")

    monkeypatch.setattr(jax, "devices", refuse)
    for name in NAMES:
        built(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": {"name": "clli"}}, r"config\.fusion\.name='clli' is no strategy; known: "),
        (
            {"fusion": {"name": "cli", "cli": {"taps": (99,)}}},
            r"config\.fusion\.cli: unknown vision layer \[99\]: this model has 0\.\.",
        ),
        (
            {"fusion": {"name": "cli", "cli": {"inject": (99,)}}},
            r"config\.fusion\.cli: unknown decoder layer \[99\]",
        ),
        ({"fusion": {"name": "sli", "sli": {"taps": ()}}}, r"config\.fusion\.sli: an empty list"),
        ({"model": {"has_newline": False}}, r"config\.model\.has_newline=False, but .*set has_"),
        ({"model": {"image": {"aspect_ratio": "any"}}}, r"config\.model\.image\.aspect_ratio is"),
    ],
)
@pytest.mark.parametrize("routing", ["none", "dpvr"])
def test_a_model_that_cannot_be_is_refused_by_its_key(changes, message, routing):
    config = module("ov7b_cli").get_config()
    config.routing.name = routing
    config.fusion = {"name": "none"}
    config.update(changes)
    with pytest.raises(ConfigError, match=message):
        experiment_lib.from_dict(config)
