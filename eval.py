"""Asks a trained model the questions of a file. `python eval.py --help` explains itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli_jax.options import at_least

DESCRIPTION = """\
Asks a trained model every question of a LLaVA-format JSON or JSONL file and compares its answers.

A row asks for its last answer: everything before it (pictures, earlier turns, the question) is the
prompt. Answers are compared after lower-casing and stripping white space and one final period.
Rows that cannot be asked (a missing picture, no answer) count as wrong and are listed.

Beside --output results.json stand predictions.jsonl (every answer) and examples.png (a contact
sheet); --output results_blank.json is accompanied by predictions_blank.jsonl, examples_blank.png.
"""

EPILOG = """\
examples
  score the newest checkpoint of the quick start on its test split:
    python eval.py --workdir runs/quick --data runs/quick/data/test.json \\
        --output results.json
  does it look at its pictures? With gray ones it must fall to the chance level in results.json:
    python eval.py --workdir runs/quick --data runs/quick/data/test.json \\
        --blank_images --output results_blank.json
  does it matter that its gates look at the picture? With their means instead:
    python eval.py --workdir runs/quick --data runs/quick/data/test.json \\
        --constant_gates runs/quick/gates.npz --output results_constant.json
  sampled answers to the first 100 questions (an earlier checkpoint: --step):
    python eval.py --workdir runs/quick --data runs/quick/data/test.json --limit 100 \\
        --temperature 0.7 --top_p 0.9 --seed 1 --output results_sampled.json
"""


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    # Imported late, so that --help and wrong options answer at once.
    from cli_jax.analysis.constant_gates import with_constant_gates
    from cli_jax.evaluate.report import table
    from cli_jax.evaluate.run import evaluate
    from cli_jax.evaluate.workdir import open_run
    from cli_jax.generate.sampling import Sampling
    from cli_jax.train.errors import EXPECTED

    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as error:
        parser.error(str(error))
    try:
        run = open_run(args.workdir, args.step)
        if args.constant_gates:
            run = with_constant_gates(run, args.constant_gates)
        with run.context():
            results = evaluate(
                run.model,
                run.params,
                run.experiment,
                args.data,
                args.image_root,
                args.output.parent,
                name=args.output.name,
                step=run.step,
                blank=args.blank_images,
                limit=args.limit,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                sampling=sampling,
            )
    except EXPECTED as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("eval.py: interrupted; no results were written", file=sys.stderr)
        return 1
    print(table(results))
    bad = results["bad_rows"]
    if bad:
        print(f"{len(bad)} rows could not be asked and count as wrong: {bad[0]['reason']}")
    print(f"written: {args.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    need = parser.add_argument_group("what to ask whom")
    need.add_argument(
        "--workdir",
        required=True,
        help="folder that train.py has written, or that of a Hugging Face checkpoint",
    )
    need.add_argument("--data", required=True, help="JSON or JSONL file with questions")
    need.add_argument(
        "--image_root", default="", help="folder of the pictures (default: that of --data)"
    )
    need.add_argument(
        "--output", required=True, type=_json_path, help="file for the numbers, NAME.json"
    )
    need.add_argument(
        "--step", type=at_least(0), help="checkpoint of this step (default: the newest)"
    )
    need.add_argument(
        "--limit", type=at_least(0), default=0, help="ask the first LIMIT questions (0 = all)"
    )
    need.add_argument(
        "--blank_images", action="store_true", help="control: gray pictures of the same size"
    )
    need.add_argument(
        "--constant_gates",
        metavar="GATES.npz",
        help="control: every gate at its mean over a data set, from analyze.py gates",
    )
    how = parser.add_argument_group("how to answer (defaults: the run's config.eval, greedy)")
    how.add_argument(
        "--batch_size", type=at_least(1), help="prompts at a time; answers do not depend on it"
    )
    how.add_argument("--max_new_tokens", type=at_least(1), help="longest answer, in tokens")
    how.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    how.add_argument(
        "--top_k", type=at_least(0), default=0, help="sample among the k likeliest (0 = all)"
    )
    how.add_argument(
        "--top_p", type=float, default=1.0, help="sample among those that reach this probability"
    )
    how.add_argument("--seed", type=int, default=0, help="of the sampling")
    return parser


def _json_path(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} must end with .json")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
