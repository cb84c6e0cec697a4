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
