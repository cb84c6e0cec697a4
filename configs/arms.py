"""Parts of comparisons: arms, sweeps that become arms, and the first stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    """The first stage of every arm: it trains all between tower and decoder, and the newline."""
    # One pattern, since one that matches nothing is refused and `none` has no `fusion/`.
    pattern = f"{common.CONNECTOR}|image_newline"
    return {"steps": steps, "changes": {"optimizer": {"groups": common.train_only(pattern, lr=lr)}}}


def headline(width: int, layers: Iterable[int], evals: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The settings that the comparisons of docs/results.md share, for towers that stay frozen.

    `none_wide` has a projector of as many parameters as the four of `sli`. Stage 1 is left out: the
    decoders start at random, so there is nothing yet that features could be aligned with.

    width: of decoder and projector. layers: vision layers below the last one that are tried.
    """
    layers, best = tuple(layers), best_single_layer("none", *(f"layer_{k}" for k in layers))
    frozen = (common.group(common.VISION_TOWER, None),)
    return {
        "arms": (
            arm("none", "none"),
            arm("none_wide", "none", model={"projector_width": 4 * width}),
            arm("cli", "cli"),
            arm("cli_mean", "cli", settings={"agf": "mean"}),
            arm("sli", "sli"),
            arm("deepstack", "deepstack"),
            arm("layer_concat", "layer_concat"),
            *single_layers(layers),
        ),
        "baseline": "none",
        "select": (best,),
        "contrasts": (
            {"arm": "cli", "against": "none"},
            {"arm": "cli", "against": best["name"]},
        ),
        "evals": tuple(evals),
        "seeds": (0, 1, 2),
        "fractions": (1.0,),
        "stage1": {"steps": 0, "changes": {}},
        "stage2": {"steps": 0, "changes": {"optimizer": {"groups": frozen}}},
        "eval_every": 0,
        "held_out_questions": 0,
        "draws": 10_000,
    }
