"""Parts of comparisons: arms, sweeps that become arms, and the first stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common

Arm = dict[str, Any]


def arm(name: str, fusion: str, *, reported: bool = True, **changes: Any) -> Arm:
    """An arm of a fusion strategy; `changes` are sections of the config, e.g. model={...}.

    Settings of the strategy itself are given as `settings`.
    """
    settings = changes.pop("settings", {})
    return {
        "name": name,
        "changes": {"fusion": {"name": fusion, fusion: settings}, **changes},
        "reported": reported,
    }


def single_layers(layers: Iterable[int]) -> tuple[Arm, ...]:
    """`none` on each of some vision layers, as candidates of `best_single_layer`."""
    return tuple(
        arm(f"layer_{k}", "none", settings={"vision_layer": k}, reported=False) for k in layers
    )


def best_single_layer(*candidates: str) -> dict[str, Any]:
    """The selection of the best arm of a sweep on held-out training pictures."""
    return {"name": "best single layer", "arms": candidates}


def stage1(steps: int, lr: float) -> dict[str, Any]:
    """The first stage of every arm: it trains what lies between tower and decoder, or beside it."""
    # One pattern, since one that matches nothing is refused and `none` has no `fusion/`.
    pattern = f"{common.CONNECTOR}|{common.ROUTING}|image_newline"
    return {"steps": steps, "changes": {"optimizer": {"groups": common.train_only(pattern, lr=lr)}}}


def gates_at(lr: float) -> dict[str, Any]:
    """The optimizer of an arm of `cli` whose gates learn at a rate of their own; frozen tower."""
    return {"groups": (common.group(common.GATES, lr), common.group(common.VISION_TOWER, None))}


def ablations() -> tuple[Arm, ...]:
    """`none`, `cli` as in the headline, and `cli` with one thing changed at a time."""

    def changed(name: str, **settings: Any) -> Arm:
        return arm(f"cli_{name}", "cli", settings=settings)

    return (
        arm("none", "none"),
        arm("cli", "cli"),
        changed("no_gates", agf="one"),
        changed("mean", agf="mean"),
        changed("no_amp", amp=False),
        changed("sparse", inject=(0,)),
        changed("medium", inject="every:2"),
        changed("3_taps", taps="every:2"),
        changed("last_tap", taps="every:6"),  # of 6 layers: only what is at the input already
        changed("early_tap", taps=(1,)),
        changed("no_last_tap", taps=(1, 2, 3, 4, 5)),  # the last one is at the input already
        changed("rank_32", rank=32),
        changed("per_pair", per_pair=True),
        changed("channel", gate="channel"),
        changed("prompt", context="prompt"),
        changed("open", gate_bias_init=0.0),
    )


def headline(
    *,
    width: int,
    encoders: Mapping[str, str],
    evals: Mapping[str, str],
    categories: Iterable[str] = (),
    steps: int,
) -> ConfigDict:
    """What the comparisons of docs/results.md share: arms, contrasts, seeds; towers stay frozen.

    `none_wide` has a projector of as many parameters as the four of `sli`. There is no stage 1:
    the decoders start at random, so there is nothing yet that features could be aligned with.

    width: of decoder and projector. encoders, evals: paths by name; `categories` of the first of
    `evals` are sets of their own.
    """
    candidates = single_layers((1, 3))
    best = best_single_layer("none", *(each["name"] for each in candidates))
    first = next(iter(evals.values()))
    frozen = (common.group(common.VISION_TOWER, None),)
    return ConfigDict(
        {
            "arms": (
                arm("none", "none"),
                arm("none_wide", "none", model={"projector_width": 4 * width}),
                arm("cli", "cli"),
                arm("cli_mean", "cli", settings={"agf": "mean"}),
                arm("sli", "sli"),
                arm("deepstack", "deepstack"),
                arm("layer_concat", "layer_concat"),
                *candidates,
            ),
            "baseline": "none",
            "select": (best,),
            "contrasts": (
                {"arm": "cli", "against": "none"},
                {"arm": "cli", "against": best["name"]},
            ),
            "evals": (
                *({"name": name, "path": path} for name, path in evals.items()),
                *({"name": c, "path": first, "categories": (c,)} for c in categories),
            ),
            "encoders": tuple({"name": n, "path": path} for n, path in encoders.items()),
            "seeds": (0, 1, 2),
            "fractions": (1.0,),
            "stage2": {"steps": steps, "changes": {"optimizer": {"groups": frozen}}},
            "eval_every": steps // 3,
            "held_out_questions": 0,
            "draws": 10_000,
        }
    )
