"""The differences that a comparison was made for, over all its encoders and seeds at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli_jax.compare.answers import is_finished, read_answers
from cli_jax.compare.bootstrap import interval
from cli_jax.compare.config import Comparison, ContrastConfig
from cli_jax.compare.runs import Run
from cli_jax.compare.summary import choose

Json = dict[str, Any]
ALL = "all"  # the row over all encoders
_Pair = tuple[Run, Run]


def contrasts(comparison: Comparison, folder: Path) -> list[Json]:
    """Every contrast on every data fraction: over all encoders, then on each of them.

    A pair of runs shares encoder, data and seed; the bootstrap draws pairs as it draws seeds. A
    contrast without a finished pair is left out.
    """
    settings, found = comparison.settings, []
    for fraction in settings.fractions:
        for contrast in settings.contrasts:
            pairs = {
                encoder.name: _pairs(comparison, folder, contrast, encoder.name, fraction)
                for encoder in settings.encoders
            }
            every = [pair for each in pairs.values() for pair in each]
            groups = {ALL: every} | (pairs if len(pairs) > 1 else {})
            found += [
                _row(comparison, folder, contrast, group)
                | {"fraction": fraction, "encoder": encoder}
                for encoder, group in groups.items()
                if group
            ]
    return found


def open_contrasts(comparison: Comparison, found: Sequence[Json]) -> list[str]:
    """The contrasts without a finished pair, on any data fraction."""
    settings, done = comparison.settings, {(each["contrast"], each["fraction"]) for each in found}
    return [
        f"{_name(contrast)}, {fraction:.0%} of the data"
        for fraction in settings.fractions
        for contrast in settings.contrasts
        if (_name(contrast), fraction) not in done
    ]


def _name(contrast: ContrastConfig) -> str:
    return f"{contrast.arm} − {contrast.against}"


def _pairs(
    comparison: Comparison, folder: Path, contrast: ContrastConfig, encoder: str, fraction: float
) -> list[_Pair]:
    """The finished runs of both sides by seed; none while a selection is open."""
    chosen = {each.name: each.arm for each in choose(comparison, folder, encoder, fraction)}
    selections = {each.name for each in comparison.settings.select}
    sides = [
        chosen.get(name) if name in selections else name
        for name in (contrast.arm, contrast.against)
    ]
    pairs = []
    for seed in comparison.settings.seeds:
        runs = [Run(encoder, fraction, seed, arm) for arm in sides if arm]
        if len(runs) == 2 and all(is_finished(comparison, folder, run) for run in runs):
            pairs.append((runs[0], runs[1]))
    return pairs


def _row(
    comparison: Comparison, folder: Path, contrast: ContrastConfig, pairs: Sequence[_Pair]
) -> Json:
    sets = {}
    for each in comparison.settings.evals:
        own, against = (
            read_answers(comparison, folder, side, each) for side in zip(*pairs, strict=True)
        )
        difference = own.correct_SxQ - against.correct_SxQ
        found = interval(difference, own.scenes, draws=comparison.settings.draws)
        sets[each.name] = found._asdict() | {"by_pair": difference.mean(axis=1).tolist()}
    return {"contrast": _name(contrast), "pairs": len(pairs), "sets": sets}
