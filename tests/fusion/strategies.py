"""Every fusion strategy as a tiny config: what the tests of all strategies run over.

A new strategy is one line here (several, where variants differ in what they compute).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from cli_jax.fusion.adapter import AdapterConfig
from cli_jax.fusion.cli import CLIConfig
from cli_jax.fusion.deepstack import DeepStackConfig
from cli_jax.fusion.dense_connector import DenseConnectorConfig
from cli_jax.fusion.layer_concat import LayerConcatConfig
from cli_jax.fusion.mmfuser import MMFuserConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.fusion.sli import SLIConfig


class Entry(NamedTuple):
    """A strategy's config for the model of `tiny.py`: tower layers 0..5, decoder layers 0..4.

    without_gradient: patterns (re.fullmatch) of the parameters below `fusion/` that have no
    gradient at the start, as the strategy's docstring says; all others must have one.
    """

    config: Any
    without_gradient: str = ""


ENTRIES = {
    "none": Entry(NoneConfig()),
    "cli": Entry(
        CLIConfig(taps=(1, 3, 5), inject=(0, 1, 3), rank=4), "amp/lora_A|agf/query_(visual|hidden)"
    ),
    "cli_channel_prompt": Entry(
        CLIConfig(
            taps=(0, (3, 5)), inject=(2, 4), rank=4, gate="channel", gate_rank=3, context="prompt"
        ),
        "amp/lora_A|agf/query_(visual|hidden)|agf/gate_kernel",
    ),
    "sli": Entry(SLIConfig(taps=(1, 3, 5), start=1)),
    "layer_concat": Entry(LayerConcatConfig(layers=(1, 3, 4))),
    "deepstack": Entry(DeepStackConfig()),
    "deepstack_early": Entry(DeepStackConfig(start=0)),
    "dense_connector_sti": Entry(DenseConnectorConfig("sti", taps=(1, 3))),
    "dense_connector_sci": Entry(DenseConnectorConfig("sci")),
    "dense_connector_dci": Entry(DenseConnectorConfig()),
    "mmfuser": Entry(MMFuserConfig(layers=(0, 2, 5), points=2), "(?!gamma1$).*"),
    "adapter": Entry(AdapterConfig(inject=(0, 2), rank=4), "branch/lora_A"),
}

every_strategy = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
