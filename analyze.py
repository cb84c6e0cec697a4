"""Looks into a trained model. `python analyze.py COMMAND --help` explains each command."""

from __future__ import annotations

import argparse
import sys

EPILOG = """\
examples
  which vision layers does each decoder layer let in, on the test split of the quick start:
    python analyze.py gates --workdir runs/quick --data val.json --image_root DIR --output out
  from which layer of a pretrained vision tower can colors, shapes, sizes or digits be read:
    python analyze.py probe --workdir runs/pretrain_nlvr --output runs/pretrain_nlvr/probe
"""

GATES = """\
Averages the gates W[t, k] of Cross-Layer Injection over the pictures of a LLaVA-format file, for
every decoder layer t and vision layer k, overall and per category. Writes gates.npz, gates.png and
one gates_CATEGORY.png per category. Needs a model with gates and matplotlib (the demo extra).
"""

PROBE = """\
Fits a linear read-out on every layer of a frozen vision tower that was trained with
config.objective=siglip: of the counts of colors, shapes and sizes in boxes, or of the digits of a
meter. Scored on the pictures that config.data.held_out kept back, beside the same read-out of the
pixels and the commonest answer. Writes probe.npz and probe.png, and prints the table. Needs
matplotlib (the demo extra).
"""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Imported late, so that --help and wrong options answer at once.
    from cli_jax.analysis.gates import GateError
    from cli_jax.analysis.plots import PlotError
    from cli_jax.train.errors import EXPECTED

    try:
        args.run(args)
    except (*EXPECTED, GateError, PlotError) as error:
        print(f"analyze.py {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"analyze.py {args.command}: interrupted", file=sys.stderr)
        return 1
    return 0


def _gates(args: argparse.Namespace) -> None:
    from cli_jax.analysis.gates import analyze_gates
    from cli_jax.evaluate.workdir import open_run

    run = open_run(args.workdir, args.step)
    with run.context():
        written, left_out = analyze_gates(
            run.model,
            run.params,
            run.experiment,
            args.data,
            args.image_root,
            args.output,
            limit=args.limit,
            batch_size=args.batch_size,
        )
    for id, reason in left_out.items():
        print(f"left out {id}: {reason}")
    for path in written:
        print(f"written: {path}")


def _probe(args: argparse.Namespace) -> None:
    from cli_jax.analysis.probe import probe

    print(probe(args.workdir, args.output, args.step).table())


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="analyze.py", description=__doc__, epilog=EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    gates = commands.add_parser(
        "gates",
        help="mean gate per decoder and vision layer",
        description=GATES,
        formatter_class=raw,
    )
    gates.set_defaults(run=_gates)
    _add_run_options(gates)

    probe = commands.add_parser(
        "probe",
        help="what each layer of a pretrained vision tower can be read for",
        description=PROBE,
        formatter_class=raw,
    )
    probe.set_defaults(run=_probe)
    probe.add_argument("--workdir", required=True, help="folder that train.py has written")
    probe.add_argument("--output", required=True, help="folder for what is written")
    probe.add_argument("--step", type=_at_least(0), help="checkpoint (default: the newest)")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command needs that looks at one trained model and one data set."""
    parser.add_argument("--workdir", required=True, help="folder that train.py has written")
    parser.add_argument("--data", required=True, help="JSON or JSONL file with questions")
    parser.add_argument(
        "--image_root", default="", help="folder of the pictures (default: that of --data)"
    )
    parser.add_argument("--output", required=True, help="folder for what is written")
    parser.add_argument("--step", type=_at_least(0), help="checkpoint (default: the newest)")
    parser.add_argument(
        "--limit", type=_at_least(0), default=0, help="use the first LIMIT rows (0 = all)"
    )
    parser.add_argument(
        "--batch_size", type=_at_least(1), help="prompts at a time (default: config.eval's)"
    )


def _at_least(least: int):
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
