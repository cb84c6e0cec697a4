"""Prefill with and without DPVR, side by side: FLOPs, time, and bytes of the KV cache.

    python -m benchmarks.dpvr                               # the paper's 32 layers, s = 18, CPU
    python -m benchmarks.dpvr --width 4096 --dtype bfloat16 # a GPU
    python -m benchmarks.dpvr --width 64 --pairs 2          # does it run?

LLaVA-1.5's decoder in the paper's setting: 576 vision and 64 text tokens, 32 layers, s = 18. Depth
and token counts decide what is saved and stay; the width may shrink, with the MLP in proportion.
The vision tower is as small as can be, and the head runs on the last position only, as in
generation. Both sides share their weights and run unrolled; they take turns, and the ratio of times
is taken turn by turn. The analytic ratio is that of model FLOPs (cli_jax/dryrun/flops.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.batch import empty
from cli_jax.config import (
    ComputeConfig,
    ImageConfig,
    ModelConfig,
    RoutingConfig,
    TextConfig,
    VisionConfig,
)
from cli_jax.dryrun import flops
from cli_jax.fusion.base import Row
from cli_jax.fusion.none import NoneConfig
from cli_jax.model.vlm import build

LAYERS, SATURATION, VISION, TEXT, BEFORE = 32, 18, 576, 64, 35  # BEFORE: text before the picture
TARGET = 0.85  # of the analytic ratio
VISION_TOWER = VisionConfig("clip", 64, 64, 1, 2, image_size=48, patch_size=2)  # 24 x 24 patches


def model_config(width: int, routing: RoutingConfig) -> ModelConfig:
    """Vicuna-7B's shapes at another width."""
    heads = max(width // 128, 1)
    text = TextConfig(
        model_type="llama",
        vocab_size=32_064,
        hidden_size=width,
        intermediate_size=width * 43 // 16,  # 11,008 at 4,096
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    image = ImageConfig(aspect_ratio="pad", multi_image="same")
    return ModelConfig(VISION_TOWER, text, image, "none", NoneConfig(), False, routing)


def prompts(rows: int) -> dict[str, np.ndarray]:
    """Rows of one prompt each: some text, the picture, the question; no slot is left over."""
    batch = empty(
        rows=rows,
        length=VISION + TEXT,
        visual=VISION,
        tiles=1,
        images=1,
        tile_size=VISION_TOWER.image_size,
        patches=VISION,
        text=TEXT,
    )
    rng = np.random.default_rng(0)
    row, slots = np.arange(VISION + TEXT), np.arange(VISION)
    seen = (row >= BEFORE) & (row < BEFORE + VISION)
    batch["input_ids"][:] = rng.integers(0, 32_000, batch["input_ids"].shape)
    batch["segment_ids"][:], batch["positions"][:], batch["image_segment"][:] = 1, row, 1
    batch["pixel_values"][:] = rng.integers(0, 256, batch["pixel_values"].shape)
    batch["plan_index"][:, :, 0], batch["plan_weight"][:, :, 0] = slots, 1
    batch["plan_inverse"][:, :, 0] = slots * 4
    batch["visual_image"][:], batch["visual_position"][:] = 0, row[seen]
    batch["visual_index"][:, seen] = slots
    batch["text_position"][:] = row[~seen]
    batch["text_index"][:, ~seen] = np.arange(TEXT)
    batch["context_end"][:] = VISION + TEXT
    return dict(batch)


@dataclasses.dataclass(frozen=True)
class Side:
    """One compiled prefill and what is known of it; FLOPs of all rows, bytes of the cache."""

    run: Callable[[], Any]
    analytic: float
    compiled: float
    cache: int


def make_side(config: ModelConfig, params: Any, batch: Any, new: int, compute: Any) -> Side:
    """Prefill with room for `new` tokens, and the logits of the next token."""
    model: Any = build(config, compute)
    rows, length = batch["input_ids"].shape

    def prefill(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        out, cache = model.apply({"params": params}, batch, length + new, method="prefill")
        return model.apply({"params": params}, out.hidden[:, -1], method="logits"), cache

    compiled = jax.jit(prefill).lower(params, batch).compile()
    counted = flops.forward(config, Row(length, VISION, 1, text=TEXT))
    head = 2.0 * config.text.hidden_size * config.text.vocab_size
    _, cache = jax.eval_shape(prefill, params, batch)
    return Side(
        run=lambda: jax.block_until_ready(compiled(params, batch)),
        analytic=rows * (sum(counted.values()) - counted["head"] + head),
        compiled=compiled.cost_analysis()["flops"],
        cache=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    )


def make_params(config: ModelConfig, batch: Any, compute: ComputeConfig) -> Any:
    """Random parameters of the routed model; the baseline takes all but the side branch."""
    model: Any = build(config, compute)
    one = {name: x[:1] for name, x in batch.items()}
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), one)["params"])
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.02 * draw(x.shape, np.float32), x.dtype), shapes)


def timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512, help="of the decoder; 128 per head")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--new", type=int, default=64, help="tokens the cache has room for")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()

    compute = ComputeConfig(args.dtype, args.dtype, scan_layers=False, remat="none")
    routed = model_config(args.width, RoutingConfig("dpvr", SATURATION))
    plain = dataclasses.replace(routed, routing=RoutingConfig())
    batch = jax.device_put(prompts(args.rows))
    params = make_params(routed, batch, compute)
    base = {name: leaf for name, leaf in params.items() if name != "routing"}
    sides = {
        "baseline": make_side(plain, base, batch, args.new, compute),
        "dpvr": make_side(routed, params, batch, args.new, compute),
    }
    for side in sides.values():
        side.run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.pairs):
        for name in sides if i % 2 == 0 else reversed(sides):
            times[name].append(timed(sides[name].run))
    report(sides, times, args)


def report(sides: dict[str, Side], times: dict[str, list[float]], args: Any) -> None:
    print(
        f"{LAYERS} layers, s = {SATURATION}, {args.rows} rows of {VISION} vision and {TEXT} text "
        f"tokens, width {args.width}, {args.dtype}, {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    for name, side in sides.items():
        middle = statistics.median(times[name])
        print(
            f"{name:>8}: {side.analytic / 1e9:9.2f} GFLOP by formula, {side.compiled / 1e9:9.2f} "
            f"compiled; {middle * 1e3:8.1f} ms ({min(times[name]) * 1e3:.1f} to "
            f"{max(times[name]) * 1e3:.1f}), {side.analytic / middle / 1e9:.1f} GFLOP/s; "
            f"KV cache {side.cache / 2**20:.2f} MiB"
        )
    before, after = sides["baseline"], sides["dpvr"]
    analytic, cache = before.analytic / after.analytic, after.cache / before.cache
    ratios = sorted(a / b for a, b in zip(times["baseline"], times["dpvr"], strict=True))
    measured = statistics.median(ratios)
    print(
        f"baseline / dpvr: {analytic:.3f} by formula, {before.compiled / after.compiled:.3f} "
        f"compiled, {measured:.3f} in time ({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} "
        f"pairs); KV cache {cache:.1%} of the baseline's"
    )
    reached = measured / analytic
    verdict = "reached" if reached >= TARGET else "missed"
    print(f"time / formula: {reached:.1%}; the target of {TARGET:.0%} is {verdict}")


if __name__ == "__main__":
    main()
