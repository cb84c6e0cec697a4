"""Looks into a trained model. `python analyze.py COMMAND --help` explains each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli_jax.options import at_least

if TYPE_CHECKING:
    from cli_jax.analysis.prompts import Findings

EPILOG = """\
examples, most of them on the test split of the quick start; out is a folder
  which vision layers does each decoder layer let in?
    python analyze.py gates --workdir runs/quick --data runs/quick/data/test.json --output out
  which vision layers are alike, and which three stand for all?
    python analyze.py layers --workdir runs/quick --data runs/quick/data/test.json --output out
  up to which decoder layer do words look at the picture?
    python analyze.py attention --workdir runs/quick --data runs/quick/data/test.json --output out
  from which layer of a pretrained vision tower can colors, shapes, sizes or digits be read?
    python analyze.py probe --workdir runs/nlvr_full --output runs/nlvr_full/probe
  fusion strategies side by side, with equal data, seeds and steps:
    python analyze.py compare --config configs/compare_meter.py --output runs/compare \\
        --config.data.root=DATA
"""

GATES = """\
Averages the gates W[t, k] of Cross-Layer Injection over the pictures of a LLaVA-format file, for
every decoder layer t and vision layer k, overall and per category. Writes gates.npz, gates.png and
one gates_CATEGORY.png per category. Needs a model with gates and matplotlib (the demo extra).
"""

LAYERS = """\
Averages the cosine similarity of a patch token's hidden states at two layers of the vision tower
over the pictures of a LLaVA-format file, for every pair of layers. Splits the layers into groups of
neighbors that are alike and names the medoid of each as a setting for fusion. Writes layers.npz and
layers.png. Layer 0 is the embedding, k the k-th block. Every patch token of every tile counts,
padding inside a tile too. --batch_size counts tiles. Needs matplotlib (the demo extra).
"""

ATTENTION = """\
Averages the attention probability that text tokens behind the last picture give to the pictures'
tokens (newlines included) over the prompts of a LLaVA-format file, for every decoder layer. A
prompt ends where the last answer of its row would begin. Names the saturation layer: the first from
which the curve stays within 0.02 of the mean of its last quarter. Writes attention.npz and
attention.png, with --per_head also attention_heads.png. Needs matplotlib (the demo extra).
"""

PROBE = """\
Fits a linear read-out on every layer of a frozen vision tower that was trained with
config.objective=siglip: of the counts of colors, shapes and sizes in boxes, or of the digits of a
meter. Scored on the pictures that config.data.held_out kept back, beside the same read-out of the
pixels and the commonest answer. Writes probe.npz and probe.png, and prints the table. Needs
matplotlib (the demo extra).
"""

COMPARE = """\
Trains every arm of a comparison on the same pictures in the same order, from the same vision tower
and seeds, for as many steps, asks all of them the same questions and reports what came of it:
results.md (accuracy over seeds, differences with intervals, categories, parameters, FLOPs, time),
results.json, and bar charts, learning curves and gates in figures/. Needs matplotlib (the demo
extra).

The config is an experiment's, as train.py takes it, with a section `compare`: arms, seeds, data
fractions, encoders, evaluation sets, the steps of both stages, and selections, which choose the
best of some arms on held-out training pictures. configs/compare_meter.py explains itself. Any value
can be changed with --config.section.name=value.

Before the first run everything is fixed in OUTPUT/protocol.json; under another config, or with
other data, the folder is refused. Stopped with Ctrl-C or killed, the same command goes on where it
was: finished runs are left alone, an unfinished one resumes from its checkpoint. Started several
times, e.g. once per core (taskset -c N) or GPU (CUDA_VISIBLE_DEVICES=N), the processes share the
runs, and the last one to end reports all. Each run's own output is in its folder's log.txt.
"""


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "compare":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.changes = rest
    # Imported late, so that --help and wrong options answer at once.
    from cli_jax.analysis.plots import PlotError
    from cli_jax.train.errors import EXPECTED

    try:
        args.run(args)
    except (*EXPECTED, PlotError) as error:
        print(f"analyze.py {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"analyze.py {args.command}: interrupted", file=sys.stderr)
        return 1
    return 0


def _gates(args: argparse.Namespace) -> None:
    from cli_jax.analysis.gates import analyze_gates

    _analyze(analyze_gates, args)


def _layers(args: argparse.Namespace) -> None:
    from cli_jax.analysis.layers import analyze_layers

    _analyze(analyze_layers, args, groups=args.groups)


def _attention(args: argparse.Namespace) -> None:
    from cli_jax.analysis.attention import analyze_attention

    _analyze(analyze_attention, args, per_head=args.per_head)


def _analyze(analysis: Callable[..., Findings], args: argparse.Namespace, **options: Any) -> None:
    """Runs an analysis of the model and the data that all commands name alike, and reports it."""
    from cli_jax.evaluate.workdir import open_run

    run = open_run(args.workdir, args.step)
    with run.context():
        found = analysis(
            run.model,
            run.params,
            run.experiment,
            args.data,
            args.image_root,
            args.output,
            limit=args.limit,
            batch_size=args.batch_size,
            **options,
        )
    for id, reason in found.left_out.items():
        print(f"left out {id}: {reason}")
    if found.summary:
        print(found.summary)
    for path in found.written:
        print(f"written: {path}")


def _probe(args: argparse.Namespace) -> None:
    from cli_jax.analysis.probe import probe

    print(probe(args.workdir, args.output, args.step).table())


def _compare(args: argparse.Namespace) -> None:
    import jax

    from cli_jax.compare.command import compare, redraw
    from cli_jax.experiment import ConfigError
    from cli_jax.flag_parser import read_config
    from cli_jax.parallel.memory import keep_freed_memory

    if args.report_only:
        if args.config or args.changes:
            raise ConfigError("--report_only reports what --output holds: give no --config")
        written = redraw(args.output, args.resample)
    else:
        if args.resample:
            raise ConfigError("--resample goes with --report_only: runs do not depend on it")
        if not args.config:
            raise ConfigError("--config is required, e.g. configs/compare_meter.py")
        config = read_config(args.config, args.changes)
        keep_freed_memory()
        if not jax.config.values["jax_compilation_cache_dir"]:  # seeds share programs
            cache = Path(args.output).absolute() / "compiled"
            jax.config.update("jax_compilation_cache_dir", str(cache))
        written = compare(config, args.output)
    for path in written:
        print(f"written: {path}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable, help: str, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=description, formatter_class=raw)
        command.set_defaults(run=run)
        return command

    gates = add("gates", _gates, "mean gate per decoder and vision layer", GATES)
    layers = add("layers", _layers, "similarity of vision layers, and groups of them", LAYERS)
    layers.add_argument(
        "--groups", type=at_least(1), default=3, help="groups of layers (default: 3)"
    )
    attention = add("attention", _attention, "attention from text to image per layer", ATTENTION)
    attention.add_argument("--per_head", action="store_true", help="save and draw every head, too")
    for command in (gates, layers, attention):
        _add_run_options(command)

    probe = add("probe", _probe, "what each layer of a pretrained tower can be read for", PROBE)
    probe.add_argument("--workdir", required=True, help="folder that train.py has written")
    probe.add_argument("--output", required=True, help="folder for what is written")
    probe.add_argument("--step", type=at_least(0), help="checkpoint (default: the newest)")

    compare = add("compare", _compare, "fusion strategies side by side", COMPARE)
    compare.allow_abbrev = False
    compare.add_argument("--config", help="config file with a section `compare`")
    compare.add_argument("--output", required=True, help="folder for the runs and the report")
    compare.add_argument(
        "--report_only",
        action="store_true",
        help="report what is finished in --output, no training",
    )
    compare.add_argument(
        "--resample",
        metavar="PATTERN",
        default="",
        help="with --report_only: intervals for what scenes have in common, by their names without "
        "what this regular expression finds in them",
    )
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command needs that looks at one trained model and one data set."""
    parser.add_argument(
        "--workdir",
        required=True,
        help="folder that train.py has written, or that of a Hugging Face checkpoint",
    )
    parser.add_argument("--data", required=True, help="JSON or JSONL file with questions")
    parser.add_argument(
        "--image_root", default="", help="folder of the pictures (default: that of --data)"
    )
    parser.add_argument("--output", required=True, help="folder for what is written")
    parser.add_argument("--step", type=at_least(0), help="checkpoint (default: the newest)")
    parser.add_argument(
        "--limit", type=at_least(0), default=0, help="use the first LIMIT rows (0 = all)"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), help="prompts at a time (default: config.eval's)"
    )


if __name__ == "__main__":
    sys.exit(main())
