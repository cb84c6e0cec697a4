"""One training step, ours and transformers' on torch: same weights, same inputs, side by side.

    python -m benchmarks.step                               # 12M parameters, CPU, float32
    python -m benchmarks.step --fusion cli                  # ours with CLI against torch's baseline
    python -m benchmarks.step --size 0p5b --dtype bfloat16 --rows 4 --compile   # a GPU

A step is forward, loss, backward, clipping and AdamW. Both sides start from the same random weights
and see the same any-resolution rows; their first losses are compared before anything is timed. Then
they take turns, and the ratio of times is taken turn by turn. torch uses its sdpa attention, all
threads, a fused AdamW, and with --compile torch.compile.

MFU is shown where the chip's peak is known or given (--peak, in TFLOP/s). FLOPs are the model's,
counted from the shapes (cli_jax/dryrun/flops.py), the same number for both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.data.collate import Sizes, collate
from cli_jax.dryrun import flops
from cli_jax.experiment import Experiment, from_dict
from cli_jax.fusion import registry
from cli_jax.parallel.memory import keep_freed_memory
from cli_jax.train.initial import init_state
from cli_jax.train.setup import Setup, make_setup
from cli_jax.train.state import flatten
from cli_jax.train.step import compile_step
from tests.model import oracle, reference, samples

PEAKS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}  # TFLOP/s, bfloat16, dense
RATE, B1, B2, EPS, CLIP = 1e-4, 0.9, 0.999, 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, its rows' length, and the picture (width, height) that every row has."""

    vision: VisionConfig
    text: TextConfig
    length: int
    picture: tuple[int, int]


SIZES = {
    "12m": Size(
        VisionConfig("siglip", 256, 1024, 6, 4, image_size=112),
        TextConfig("qwen2", 4096, 320, 1024, 5, 5, 1, 64, tie_word_embeddings=True),
        length=512,
        picture=(224, 224),
    ),
    "0p5b": Size(
        VisionConfig(),
        TextConfig(tie_word_embeddings=True),
        length=4096,
        picture=(640, 480),
    ),
}


def model_config(size: Size, fusion: str) -> ModelConfig:
    sides = [size.vision.image_size * n for n in range(1, 7)]
    image = ImageConfig(
        aspect_ratio="anyres_max_9", grid_pinpoints=tuple((h, w) for h in sides for w in sides)
    )
    return ModelConfig(size.vision, size.text, image, fusion, registry.get(fusion).Config())


def make_rows(size: Size, config: ModelConfig, rows: int) -> list[samples.Prompt]:
    """Prompts that fill a row exactly: some text, a picture, and text that carries the loss."""
    plan = samples.layouts(samples.prompt("p", 0, 9, [size.picture]), config)[0]
    text, rng = size.length - plan.num_tokens, np.random.default_rng(0)
    if text < 32:
        raise SystemExit(f"rows of {size.length} are too short: the picture has {plan.num_tokens}")
    found = []
    for row in range(rows):
        ids = rng.integers(samples.FIRST_TEXT_ID, config.text.vocab_size, text).tolist()
        ids.insert(16, samples.IMAGE)
        found.append(samples.Prompt(tuple(ids), (samples.picture(*size.picture, row),)))
    return found


def our_batch(prompts: list[samples.Prompt], config: ModelConfig, length: int) -> Any:
    """The rows as a Batch; everything behind the picture is labeled."""
    each = []
    for i, prompt in enumerate(prompts):
        sample = samples.to_sample(str(i), prompt, config, lambda plan: plan)
        labels = sample.labels.copy()
        behind = int(sample.visual_position[-1]) + 1
        labels[behind:] = sample.ids[behind:]
        each.append([dataclasses.replace(sample, labels=labels)])
    extent = each[0][0].extent
    vision = config.vision
    sizes = Sizes(
        rows=len(prompts),
        length=length,
        visual=extent.visual,
        tiles=extent.tiles,
        images=1,
        tile_size=vision.image_size,
        patches=vision.num_patches,
        pooled=samples.extras_of(config).pooled,
        stacks=samples.extras_of(config).stacks,
    )
    return collate(each, sizes)


def experiment(config: ModelConfig, batch: Any, dtype: str, remat: str) -> Experiment:
    rows, length = batch["input_ids"].shape
    on_cpu = jax.default_backend() == "cpu"
    return from_dict(
        {
            "name": "step",
            "model": {
                "vision": dataclasses.asdict(config.vision),
                "text": dataclasses.asdict(config.text),
                "image": dataclasses.asdict(config.image),
            },
            "fusion": {"name": config.fusion_name},
            "data": {
                "batch_size": rows,
                "row_length": length,
                "visual_per_row": batch["visual_position"].shape[1],
                "tiles_per_row": batch["pixel_values"].shape[1],
                "images_per_row": 1,
            },
            "optimizer": {
                "lr": RATE,
                "b1": B1,
                "b2": B2,
                "eps": EPS,
                "clip_norm": CLIP,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "compute": {
                "dtype": dtype,
                "scan_layers": not on_cpu,
                "remat": remat,
                "loss_chunk": 0 if on_cpu else 1024,
            },
        }
    )


def ours(setup: Setup, params: dict[str, Any], batch: Any) -> Callable[[int], float]:
    """A function that does n updates and returns the last loss."""
    leaves = {k: jax.device_put(v) for k, v in flatten(params).items()}
    state = init_state(setup, leaves)
    arrays = {k: jax.device_put(batch[k], v.sharding) for k, v in setup.batch.items()}
    update = compile_step(setup)

    def run(n: int) -> float:
        nonlocal state
        for _ in range(n):
            state, metrics = update(state, arrays)
        return float(metrics["loss"])

    return run


def theirs(
    model: torch.nn.Module, case: oracle.Case, prompts: list[samples.Prompt], args: Any
) -> Callable[[int], float]:
    """The same for torch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = args.dtype == "bfloat16"
    model = model.to(device).train()
    each = [oracle.reference_inputs(case, prompt) for prompt in prompts]
    inputs = {k: torch.cat([x[k] for x in each]).to(device) for k in each[0]}
    ids = inputs["input_ids"]
    labels = ids.clone()
    last = int((ids[0] == reference.IMAGE_TOKEN).nonzero().max())
    labels[:, : last + 1] = -100
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(B1, B2), eps=EPS, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model) if args.compile else model

    def run(n: int) -> float:
        for _ in range(n):
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = forward(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    return run


def timed(run: Callable[[int], float], steps: int) -> float:
    begun = time.perf_counter()
    run(steps)
    return (time.perf_counter() - begun) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="12m")
    parser.add_argument("--fusion", choices=sorted(registry.STRATEGIES), default="none")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="per round and side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="none", help="ours only")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--peak", type=float, default=0.0, help="TFLOP/s of the device")
    args = parser.parse_args()

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room, too
    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size = SIZES[args.size]
    config, plain = model_config(size, args.fusion), model_config(size, "none")
    model = reference.build(plain)
    reference.draw_parameters(model, 0, 1.0)
    params = reference.to_params(model.state_dict(), tied=plain.text.tie_word_embeddings)
    case = oracle.Case(plain, model, params, {})
    prompts = make_rows(size, plain, args.rows)
    batch = our_batch(prompts, plain, size.length)
    setup = make_setup(experiment(config, batch, args.dtype, args.remat), jax.devices()[:1])
    sides = {"ours": ours(setup, params, batch), "torch": theirs(model, case, prompts, args)}
    losses = {name: run(1) for name, run in sides.items()}
    print("first loss:", ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    tolerance = 1e-4 if args.dtype == "float32" else 2e-2
    if args.fusion == "none" and abs(losses["ours"] / losses["torch"] - 1) > tolerance:
        raise SystemExit("the two sides do not compute the same: nothing was timed")
    for run in sides.values():
        run(2)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.rounds):
        for name in sides if i % 2 == 0 else reversed(sides):
            times[name].append(timed(sides[name], args.steps))
    report(times, setup, batch, args)


def report(times: dict[str, list[float]], setup: Setup, batch: Any, args: Any) -> None:
    rows, length = batch["input_ids"].shape
    model = setup.experiment.model
    work = sum(flops.step(model, flops.row_of(setup.experiment), rows, setup.rates).values())
    device = jax.devices()[0].device_kind
    peak = args.peak or PEAKS.get(device, 0.0)
    count = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))
    print(
        f"{args.size}, {count / 1e6:.1f}M parameters, {args.dtype}, {rows} rows of {length} "
        f"({batch['pixel_values'].shape[1]} tiles), {work / 1e9:.1f} GFLOP a step, {device}, "
        f"jax {jax.__version__}, torch {torch.__version__}"
    )
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        mfu = f", MFU {work / middle / peak / 1e12:.1%}" if peak else ""
        print(
            f"{name:>6}: {middle * 1e3:8.1f} ms ({min(seconds) * 1e3:.1f} to "
            f"{max(seconds) * 1e3:.1f}), {rows * length / middle:,.0f} tokens/s, "
            f"{rows / middle:,.2f} images/s, {work / middle / 1e12:.3f} TFLOP/s{mfu}"
        )
    ratios = sorted(a / b for a, b in zip(times["ours"], times["torch"], strict=True))
    print(
        f"ours / torch: {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} pairs)"
    )


if __name__ == "__main__":
    main()
