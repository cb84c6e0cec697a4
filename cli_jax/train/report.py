"""The parameter table printed at the start of a run."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from cli_jax.train.optimizer import Rates

NEW = ("fusion", "routing")  # parameters that no base model has; listed one by one


def parameter_table(leaves: dict[str, Any], rates: Rates) -> str:
    """One line per part of the model: name, shape or arrays, count, share, and rate or "frozen".

    The fusion strategy's and the routing's own parameters are listed leaf by leaf; the rest of the
    model by its first two path components.
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
    total = sum(sizes.values())
    groups: dict[str, list[str]] = defaultdict(list)
    for path in leaves:
        groups[path if _is_new(path) else "/".join(path.split("/")[:2])].append(path)
    rows = [("parameters", "count", "share", "trained")]
    for name, paths in groups.items():
        shown = f"{name} {list(leaves[name].shape)}" if _is_new(name) else name
        rows.append(_row(shown, paths, sizes, rates, total))
    for part in NEW:
        if new := [path for path in leaves if path.startswith(f"{part}/")]:
            rows.append(_row(f"new: {part}/*", new, sizes, rates, total))
    rows.append(_row("total", list(leaves), sizes, rates, total))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {share:>{widths[2]}}  {state}"
        for name, count, share, state in rows
    ]
    return "\n".join(lines)


def _row(
    name: str, paths: list[str], sizes: dict[str, int], rates: Rates, total: int
) -> tuple[str, str, str, str]:
    count = sum(sizes[path] for path in paths)
    trained = sum(sizes[path] for path in paths if rates[path] is not None)
    used = sorted({rate for path in paths if (rate := rates[path]) is not None})
    if not trained:
        state = "frozen"
    else:
        state = "lr " + ", ".join(f"{rate:g}" for rate in used)
        if trained < count:
            state += f" ({trained:,} trained, {count - trained:,} frozen)"
    return name, f"{count:,}", f"{100 * count / total:.3f}%", state


def _is_new(path: str) -> bool:
    return path.split("/")[0] in NEW
