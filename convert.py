"""Hugging Face checkpoints in and out. `python convert.py COMMAND --help` explains each command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cli_jax.hf.error import ConversionError

EPILOG = """\
examples
  a released LLaVA-OneVision, for config.init_from or any other use:
    python convert.py from-hf llava-hf/llava-onevision-qwen2-0.5b-ov-hf ckpt/ov0p5b
    python convert.py from-hf lmms-lab/llava-onevision-qwen2-0.5b-ov ckpt/ov0p5b_lmms \\
        --vocab_size 152000
  LLaVA-1.5's original files, which are pickles and hold no vision tower:
    python convert.py bin-to-safetensors DOWNLOADED ckpt/llava15_raw
    python convert.py from-hf ckpt/llava15_raw ckpt/llava15 \\
        --vision openai/clip-vit-large-patch14-336
  stage 1 from separate models:
    python convert.py compose ckpt/stage1 --vision google/siglip-so400m-patch14-384 \\
        --language Qwen/Qwen2-0.5B-Instruct --vocab_size 152000
  what was trained, for transformers:
    python convert.py to-hf runs/ov0p5b out/ov0p5b_cli --dtype bfloat16
  only what CLI added, from a run that trained nothing else; and back onto its base:
    python convert.py to-hf runs/ov7b_adapter out/adapter --adapter_only
    python convert.py from-hf ckpt/ov7b out/ov7b_cli --adapter out/adapter
"""


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parser().parse_args(argv))
    run, command = arguments.pop("run"), arguments.pop("command")
    try:
        return run(**arguments)
    except ConversionError as error:
        print(f"convert.py {command}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"convert.py {command}: interrupted; nothing was written", file=sys.stderr)
    return 1


def _from_hf(source: str, out: str, **options: Any) -> int:
    from cli_jax.hf.from_hf import from_hf

    return _show(from_hf(source, out, **options), out)


def _to_hf(source: str, out: str, **options: Any) -> int:
    from cli_jax.experiment import ConfigError
    from cli_jax.hf.to_hf import to_hf
    from cli_jax.train.checkpoint import CheckpointError

    try:
        return _show(to_hf(source, out, **options), out)
    except (CheckpointError, ConfigError) as error:
        raise ConversionError(str(error)) from error


def _compose(out: str, **options: Any) -> int:
    from cli_jax.hf.compose import compose

    return _show(compose(out, **options), out)


def _bin_to_safetensors(source: str, out: str, **options: Any) -> int:
    from cli_jax.hf.pickles import bin_to_safetensors

    for name, why in bin_to_safetensors(source, out, **options).items():
        print(f"left out {name}: {why}")
    print(f"written: {out}")
    return 0


def _verify(source: str, **options: Any) -> int:
    from cli_jax.hf.verify import verify

    result = verify(source, **options)
    print(json.dumps(result, indent=2))
    print("equal within the bound" if result["equal"] else "DIFFERENT: do not use this conversion")
    return 0 if result["equal"] else 1


def _show(report: dict[str, Any], out: str) -> int:
    from cli_jax.hf.save import format_report

    print(format_report(report))
    print(f"written: {Path(out)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, summary: str, details: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary}. {details}")
        added.set_defaults(run=run)
        return added

    def common(added: argparse.ArgumentParser, *, vocabulary: bool = True) -> None:
        if vocabulary:
            added.add_argument(
                "--vocab_size",
                type=int,
                metavar="N",
                help="append vocabulary rows up to N, each the mean of the others (so that it is"
                " never the likeliest token); without this, sizes must agree",
            )
        added.add_argument(
            "--max_shard_gb", type=float, default=5.0, help="size of one output file (default 5)"
        )
        added.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")

    image_token: dict[str, Any] = {
        "type": int,
        "metavar": "ID",
        "help": "id of <image> in config.json (default: the source's, else llava-hf's: 151646 for"
        " Qwen2, 32000 for LLaMA)",
    }
    added = command(
        "from-hf",
        _from_hf,
        "any LLaVA checkpoint -> a folder for config.init_from and transformers",
        "Reads llava-hf, lmms-lab and liuhaotian naming from a folder or hub id, in single or"
        " sharded safetensors, and copies every tensor byte for byte under the llava-hf names. All"
        " missing, extra or misshapen tensors are listed in one error. conversion.json says what"
        " came from where.",
    )
    added.add_argument("source", metavar="SRC", help="a folder or a hub id")
    added.add_argument("out", metavar="OUT", help="a new folder")
    added.add_argument(
        "--vision",
        metavar="SRC",
        help="CLIP or SigLIP checkpoint, for a SRC without its tower or without its description",
    )
    added.add_argument(
        "--adapter",
        metavar="DIR",
        help="folder with cli_adapter.* to join with this base; refused unless it is its own base",
    )
    added.add_argument("--image_token_id", **image_token)
    common(added)

    added = command(
        "to-hf",
        _to_hf,
        "a workdir, or one of its checkpoints -> a folder that transformers loads",
        "Writes the base model for LlavaOnevisionForConditionalGeneration (or, where a picture is"
        " one tile, LlavaForConditionalGeneration), its config and tokenizer. What the fusion"
        " strategy added goes into cli_adapter.safetensors and cli_adapter.json.",
    )
    added.add_argument("source", metavar="WORKDIR", help="or WORKDIR/checkpoints/STEP")
    added.add_argument("out", metavar="OUT", help="a new folder")
    added.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    added.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of the base model's weights; `keep` (default) is the training's own (float32 master"
        " weights give identical logits); loss of precision is reported",
    )
    added.add_argument("--tokenizer", metavar="DIR", help="default: the folder the run used")
    added.add_argument(
        "--adapter_only", action="store_true", help="only cli_adapter.* (of `cli`: a few MB)"
    )
    added.add_argument("--image_token_id", **image_token)
    common(added)

    added = command(
        "compose",
        _compose,
        "a vision tower and a language model -> a folder to start stage 1 from",
        "SigLIP is used without its last layer and head, CLIP whole; a text tower is ignored. The"
        " projector and image_newline are initialized when training starts, unless --projector has"
        " them. The table says what came from where.",
    )
    added.add_argument("out", metavar="OUT", help="a new folder")
    added.add_argument("--vision", required=True, metavar="SRC", help="SigLIP or CLIP")
    added.add_argument(
        "--language", required=True, metavar="SRC", help="Qwen2, Vicuna, MobileLLaMA"
    )
    added.add_argument("--projector", metavar="SRC", help="safetensors of a stage-1 projector")
    added.add_argument("--vision_layers", type=int, metavar="N", help="how many layers to keep")
    common(added)

    added = command(
        "bin-to-safetensors",
        _bin_to_safetensors,
        "pickled torch weights (.bin, .pt) -> safetensors",
        "Needs torch, and uses its restricted loader (weights_only=True): a pickle could otherwise"
        " run any code. Every other command refuses pickles. Names and dtypes stay as they are.",
    )
    added.add_argument("source", metavar="SRC", help="a folder or one file")
    added.add_argument("out", metavar="OUT", help="a new folder")
    common(added, vocabulary=False)

    added = command(
        "verify",
        _verify,
        "compare our logits with transformers' on one picture and prompt",
        "Needs torch. SRC is a folder that transformers loads: the output of from-hf or to-hf, or a"
        " llava-hf repository. Both run in float32 on the CPU, one after the other. Exit code 1 if"
        " they differ. A fusion adapter in SRC is left aside: transformers has none.",
    )
    added.add_argument("source", metavar="SRC", help="a folder or a hub id")
    added.add_argument("--image", metavar="FILE", help="default: a made-up picture, 500 x 375")
    added.add_argument("--prompt", help="default: a question about the picture")
    added.add_argument(
        "--bound",
        type=float,
        default=1e-3,
        help="largest allowed difference, in standard deviations of the logits (default 1e-3)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
