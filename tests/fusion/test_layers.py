"""Which vision layers are tapped and before which decoder layers something is added."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from cli_jax.config import TextConfig, VisionConfig
from cli_jax.fusion import registry
from cli_jax.fusion.base import injection_layers, layers_of, take_taps, taps
from cli_jax.fusion.cli import CLI, CLIConfig
from cli_jax.fusion.none import NoFusion, NoneConfig

SIGLIP = VisionConfig()
CLIP = VisionConfig(model_type="clip", num_hidden_layers=24)
QWEN2 = TextConfig(num_hidden_layers=28)


@pytest.mark.parametrize(
    ("spec", "vision", "expected"),
    [
        ("all", SIGLIP, range(1, 27)),
        ("all", CLIP, range(1, 24)),  # V_last is 23: the 24th layer feeds nothing in LLaVA-1.5
        ("every:3", SIGLIP, [2, 5, 8, 11, 14, 17, 20, 23, 26]),
        ("every:5", CLIP, [3, 8, 13, 18, 23]),
        ("every:100", SIGLIP, [26]),
        ((0, 13, 26), SIGLIP, [0, 13, 26]),
        ((24, 3), CLIP, [3, 24]),
    ],
)
def test_taps(spec, vision, expected):
    assert taps(spec, vision) == tuple((k,) for k in expected)


def test_a_tap_may_be_a_mean_of_layers():
    assert taps((2, (4, 3)), SIGLIP) == ((2,), (3, 4))
    assert layers_of(((2,), (3, 4), (26,))) == (2, 3, 4, 26)
    hidden = jnp.arange(8.0).reshape(4, 1, 1, 2)
    mixed = take_taps(hidden, (2, 3, 4, 26), ((3, 4, 26), (2,)))
    np.testing.assert_array_equal(mixed[:, 0, 0], [[4, 5], [0, 1]])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("all", range(28)), ("every:3", range(0, 28, 3)), ("every:40", [0]), ((27, 0), [0, 27])],
)
def test_injection_points(spec, expected):
    assert injection_layers(spec, QWEN2) == tuple(expected)


@pytest.mark.parametrize(
    ("find", "model", "spec", "message"),
    [
        (taps, SIGLIP, (27,), r"unknown vision layer \[27\]: this model has 0\.\.26"),
        (taps, SIGLIP, ((3, 30),), r"unknown vision layer \[30\]"),
        (taps, SIGLIP, (3, 3), "taps .* repeat"),
        (taps, SIGLIP, ((3, 3),), "vision layers .* repeat"),
        (taps, SIGLIP, (), "an empty list of taps"),
        (taps, SIGLIP, "every:0", "'every:0' does not name vision layers: use 'all'"),
        (injection_layers, QWEN2, (-1,), r"unknown decoder layer \[-1\]: this model has 0\.\.27"),
        (injection_layers, QWEN2, (4, 4), "decoder layers .* repeat"),
        (injection_layers, QWEN2, (), "an empty list of decoder layers"),
        (injection_layers, QWEN2, "dense", "'dense' does not name decoder layers"),
    ],
)
def test_bad_layers_are_named(find, model, spec, message):
    with pytest.raises(ValueError, match=message):
        find(spec, model)


def test_layers_the_tower_emits():
    assert NoFusion.vision_layers(NoneConfig(), CLIP) == (23,)
    assert NoFusion.vision_layers(NoneConfig(vision_layer=0), CLIP) == (0,)
    assert CLI.vision_layers(CLIConfig(taps=(24, 3)), CLIP) == (3, 23, 24)
    assert CLI.vision_layers(CLIConfig(taps=((1, 2), 26)), SIGLIP) == (1, 2, 26)


def test_only_a_pooled_prompt_needs_ignored_labels():
    assert CLI.needs_prompt_context(CLIConfig(context="prompt"))
    assert not CLI.needs_prompt_context(CLIConfig(context="image"))
    assert not CLI.needs_prompt_context(CLIConfig(context="prompt", agf="mean"))
    assert not NoFusion.needs_prompt_context(NoneConfig())


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("gate_rank", 0), ("alpha", -1.0)])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"fusion\.cli\.{name} is {value}"):
        dataclasses.replace(CLIConfig(), **{name: value})


def test_unknown_strategies_are_refused():
    known = re.escape(str(sorted(registry.STRATEGIES)))
    with pytest.raises(
        ValueError, match=f"config.fusion.name='clip' is no strategy; known: {known}"
    ):
        registry.get("clip")
