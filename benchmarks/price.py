"""What Cross-Layer Injection and the other strategies cost on named rows of LLaVA-OneVision-7B.

    python -m benchmarks.price                              # FLOPs, counted from the shapes
    python -m benchmarks.price --compile v5p:2x2x2          # also memory, by the TPU compiler
    python -m benchmarks.price --compile v5e:2x4 --narrow --rows "37 tiles"

A row holds one picture and 256 tokens of text. FLOPs are those of an update in which everything is
trained. Memory is the compiled step's peak beyond that of the baseline, one such row per device,
against the size of the bank, 2 x K x P x D bytes. --narrow keeps depths, taps, points and rows but
cuts the widths (decoder 1,024, tower 256, 32,000 words): it compiles in minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from cli_jax.dryrun import flops
from cli_jax.dryrun.chips import Topology, describe
from cli_jax.dryrun.compile import compile_for
from cli_jax.experiment import Experiment, from_dict
from cli_jax.fusion import registry
from cli_jax.fusion.base import Row
from cli_jax.fusion.cli import CLIConfig
from cli_jax.fusion.none import NoneConfig
from cli_jax.image.anyres import layout
from configs import ov7b_cli

TEXT = 256
PICTURES = {"one tile": (384, 384), "640x480": (640, 480), "37 tiles": (2304, 2304)}
NINE = tuple(range(0, 27, 3))
CHOICES = {
    "9 taps, 9 points": CLIConfig(taps="every:3", inject=NINE),
    "9 taps, 10 points (the config)": CLIConfig(),
    "26 taps, 28 points (all-to-all)": CLIConfig(taps="all", inject="all"),
    "26 taps, 9 points": CLIConfig(taps="all", inject=NINE),
    "9 taps, 28 points": CLIConfig(taps="every:3", inject="all"),
    "4 taps, 4 points": CLIConfig(taps="every:7", inject="every:7"),
}
OTHERS: dict[str, tuple[str, dict[str, Any], int]] = {  # strategy, settings, pictures per row
    "sli": ("sli", {}, 1),
    "mmfuser": ("mmfuser", {}, 1),
    "layer_concat": ("layer_concat", {}, 1),
    "deepstack": ("deepstack", {}, 1),
    "deepstack, 16 places for pictures": ("deepstack", {}, 16),
    "dense_connector sti": ("dense_connector", {"variant": "sti"}, 1),
    "dense_connector sci": ("dense_connector", {"variant": "sci"}, 1),
    "dense_connector dci": ("dense_connector", {"variant": "dci"}, 1),
}


def row_of(size: tuple[int, int], experiment: Experiment) -> Row:
    model = experiment.model
    plan = layout(*size, model.image, model.vision, single=True, extras=experiment.extras)
    return Row(TEXT + plan.num_tokens, plan.num_tokens, plan.num_tiles)


def with_fusion(experiment: Experiment, fusion: CLIConfig | None) -> Experiment:
    name, config = ("cli", fusion) if fusion else ("none", NoneConfig())
    return with_strategy(experiment, name, config)


def with_strategy(experiment: Experiment, name: str, config: Any) -> Experiment:
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, fusion_name=name, fusion=config),
    )


def narrow(config: ConfigDict) -> ConfigDict:
    """The config with its depths and with widths that compile in minutes."""
    config.model.vision.update(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    config.model.text.update(
        hidden_size=1024,
        intermediate_size=5120,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=32_000,
    )
    return config


def peak(experiment: Experiment, row: Row, topology: Topology) -> float:
    """Bytes that a device needs at most with one such row per device."""
    data = dataclasses.replace(
        experiment.data,
        batch_size=len(topology.devices),
        row_length=-(-row.length // 128) * 128,
        visual_per_row=row.visual,
        tiles_per_row=row.tiles,
        images_per_row=1,
    )
    return compile_for(dataclasses.replace(experiment, data=data), topology).memory.total


def flops_of(experiment: Experiment, row: Row) -> float:
    rates = dict.fromkeys(flops.OWNERS, 1e-5)
    return sum(flops.step(experiment.model, row, 1, rates).values())


def others_table(experiment: Experiment) -> None:
    """What an update of the other strategies costs beyond the baseline's."""
    print("\n| row", *OTHERS, sep=" | ", end=" |\n")
    print("|---" * (1 + len(OTHERS)) + "|")
    for name, size in PICTURES.items():
        cells = []
        for strategy, settings, images in OTHERS.values():
            config = registry.get(strategy).Config(**settings)
            changed = with_strategy(experiment, strategy, config)
            row = row_of(size, changed)._replace(images=images)
            base = flops_of(with_fusion(experiment, None), row_of(size, experiment))
            cells.append(f"{flops_of(changed, row) / base - 1:+.2%}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compile", default="", help="topology for the memory")
    parser.add_argument("--choices", type=int, default=1, help="how many of them to compile")
    parser.add_argument("--rows", nargs="+", default=list(PICTURES), help="which rows to compile")
    parser.add_argument("--narrow", action="store_true", help="compile with small widths")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the TPU compiler is all that is needed of a TPU
    experiment = from_dict(ov7b_cli.get_config())
    print("| row | tiles | visual tokens | baseline TFLOP", *CHOICES, sep=" | ", end=" |\n")
    print("|---" * (4 + len(CHOICES)) + "|")
    for name, size in PICTURES.items():
        row = row_of(size, experiment)
        base = flops_of(with_fusion(experiment, None), row)
        cells = []
        for choice in CHOICES.values():
            changed = with_fusion(experiment, choice)
            cells.append(f"+{flops_of(changed, row) / base - 1:.2%}")
        print(
            f"| {name} | {row.tiles} | {row.visual:,} | {base / 1e12:,.1f} | "
            + " | ".join(cells)
            + " |"
        )
    others_table(experiment)
    if not args.compile:
        return
    if args.narrow:
        experiment = from_dict(narrow(ov7b_cli.get_config()))
    topology = describe(args.compile)
    print(
        "\n| row | choice | peak without, MB | extra, MB | bank 2KPD, MB | ratio |\n"
        "|---|---|---|---|---|---|"
    )
    for name in args.rows:
        row = row_of(PICTURES[name], experiment)
        base = peak(with_fusion(experiment, None), row, topology)
        for label in list(CHOICES)[: args.choices]:
            changed = with_fusion(experiment, CHOICES[label])
            extra = peak(changed, row, topology) - base
            taps = registry.of(changed.model).banked_taps(CHOICES[label], changed.model.vision)
            bank = 2.0 * len(taps) * row.visual * changed.model.text.hidden_size
            cells = (
                f"{base / 1e6:,.0f} | {extra / 1e6:,.0f} | {bank / 1e6:,.0f} | {extra / bank:.2f}"
            )
            print(f"| {name} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
