"""What Cross-Layer Injection costs on named rows of LLaVA-OneVision-7B: FLOPs and memory.

    python -m benchmarks.price                          # FLOPs, counted from the shapes
    python -m benchmarks.price --compile v5p:2x2x2      # also temporaries, by the TPU compiler

A row holds one picture and 256 tokens of text. FLOPs are those of an update in which everything is
trained. Temporaries are the compiled step's beyond those of the baseline, against the size of the
bank, 2 x K x P x D bytes.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax

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


def row_of(size: tuple[int, int], experiment: Experiment) -> Row:
    plan = layout(*size, experiment.model.image, experiment.model.vision, single=True)
    return Row(TEXT + plan.num_tokens, plan.num_tokens, plan.num_tiles)


def with_fusion(experiment: Experiment, fusion: CLIConfig | None) -> Experiment:
    name, config = ("cli", fusion) if fusion else ("none", NoneConfig())
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, fusion_name=name, fusion=config),
    )


def temporaries(experiment: Experiment, row: Row, topology: Topology) -> float:
    """Bytes of the step's temporaries with one such row per device."""
    data = dataclasses.replace(
        experiment.data,
        batch_size=len(topology.devices),
        row_length=-(-row.length // 128) * 128,
        visual_per_row=row.visual,
        tiles_per_row=row.tiles,
        images_per_row=1,
    )
    return compile_for(dataclasses.replace(experiment, data=data), topology).memory.temporaries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compile", default="", help="topology for the temporaries")
    parser.add_argument("--choices", type=int, default=1, help="how many of them to compile")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the TPU compiler is all that is needed of a TPU
    experiment = from_dict(ov7b_cli.get_config())
    rates = dict.fromkeys(flops.OWNERS, 1e-5)
    print("| row | tiles | visual tokens | baseline TFLOP", *CHOICES, sep=" | ", end=" |\n")
    print("|---" * (4 + len(CHOICES)) + "|")
    for name, size in PICTURES.items():
        row = row_of(size, experiment)
        base = sum(flops.step(with_fusion(experiment, None).model, row, 1, rates).values())
        cells = []
        for choice in CHOICES.values():
            model = with_fusion(experiment, choice).model
            cells.append(f"+{sum(flops.step(model, row, 1, rates).values()) / base - 1:.2%}")
        print(
            f"| {name} | {row.tiles} | {row.visual:,} | {base / 1e12:,.1f} | "
            + " | ".join(cells)
            + " |"
        )
    if not args.compile:
        return
    topology = describe(args.compile)
    print(
        "\n| row | choice | extra temporaries, MB | bank 2KPD, MB | ratio |\n|---|---|---|---|---|"
    )
    for name, size in PICTURES.items():
        row = row_of(size, experiment)
        base = temporaries(with_fusion(experiment, None), row, topology)
        for label in list(CHOICES)[: args.choices]:
            changed = with_fusion(experiment, CHOICES[label])
            extra = temporaries(changed, row, topology) - base
            taps = registry.of(changed.model).banked_taps(CHOICES[label], changed.model.vision)
            bank = 2.0 * len(taps) * row.visual * changed.model.text.hidden_size
            cells = f"{extra / 1e6:,.0f} | {bank / 1e6:,.0f} | {extra / bank:.2f}"
            print(f"| {name} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
