"""Parts of comparisons: arms, and sweeps that become arms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
