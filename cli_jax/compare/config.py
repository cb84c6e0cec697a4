"""What a comparison is: an experiment's config with a section `compare`, checked at the door.

Everything outside of `compare` is the base experiment that all arms share. An arm changes the
fusion strategy, the routing, the projector's width or the optimizer, and nothing else; the checks
are here. Of the base, `seed`, `total_steps`, `eval.path` and `eval.limit` play no part, since every
run has its own, and checkpoints are kept as the held-out curve needs them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli_jax.experiment import (
    CheckpointConfig,
    ConfigError,
    EvalConfig,
    Experiment,
    build,
    from_dict,
    locate,
    plain,
)

HELD_OUT = "held_out"  # the held-out pictures' place among the evaluation files
_NAME = re.compile(r"\w[\w.+=-]*")  # names become folders
_ARM_MAY_CHANGE = ("fusion", "routing", "model", "optimizer")  # model: the projector's width
_STAGE_MAY_CHANGE = ("optimizer",)
Changes = Mapping[str, Any]  # nested, as in the config: {"fusion": {"name": "none"}}


@dataclasses.dataclass(frozen=True)
class ArmConfig:
    """One way of fusing. An arm that is not `reported` never meets the evaluation sets, unless a
    selection chooses it."""

    name: str
    changes: Changes = dataclasses.field(default_factory=dict)
    reported: bool = True


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """A row of the table for the best of some arms, chosen on held-out training pictures."""

    name: str
    arms: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ContrastConfig:
    """A difference of two arms, or selections, that the comparison was made for."""

    arm: str
    against: str


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A pretrained vision tower (see Experiment.tower_from).

    An empty path: the tower of the model that all start from (`init_from`), or else a random one.
    """

    name: str
    path: str = ""


@dataclasses.dataclass(frozen=True)
class EvalSetConfig:
    """Questions of a file, one a row; of some categories only, if any are named."""

    name: str
    path: str
    image_root: str = ""
    categories: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A training with every arm's own parameters: its length and how it differs from the base."""

    steps: int
    changes: Changes = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The section `compare`. Each encoder, fraction, seed and arm is a run of stage 1, then 2.

    The base's `data.held_out` and `data.scene` say which pictures no arm is trained on: selections
    and learning curves use them. The bootstrap draws the pictures of a scene as one.
    """

    arms: tuple[ArmConfig, ...]
    evals: tuple[EvalSetConfig, ...]
    stage2: StageConfig
    stage1: StageConfig = StageConfig(steps=0)
    baseline: str = "none"  # the arm that the others are compared with
    select: tuple[SelectionConfig, ...] = ()
    contrasts: tuple[ContrastConfig, ...] = ()
    encoders: tuple[EncoderConfig, ...] = (EncoderConfig("random"),)
    seeds: tuple[int, ...] = (0,)
    fractions: tuple[float, ...] = (1.0,)  # of the training pictures that are not held out
    held_out_questions: int = 0  # at most so many of a held-out picture, drawn once; 0 = all
    eval_every: int = 0  # stage-2 updates between points of the held-out curve; 0 = no curve
    draws: int = 10_000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checked comparison. `raw`: the config as plain JSON; `base`: with absolute paths.

    `resample` is a report's: scenes whose names are equal without what it finds are drawn as one.
    """

    raw: dict[str, Any]
    base: Experiment
    settings: CompareConfig
    resample: str = ""

    def arm(self, name: str) -> ArmConfig:
        return next(arm for arm in self.settings.arms if arm.name == name)

    def experiment(self, arm: str, stage: StageConfig) -> Experiment:
        """The base with a stage's and an arm's changes; data, seed and start are the run's.

        What both change is the arm's in stage 2, and in stage 1 the stage's: what is aligned there
        is the same in all arms.
        """
        config = {key: value for key, value in self.raw.items() if key != "compare"}
        last = stage is self.settings.stage2
        own = self.arm(arm).changes
        for changes in (stage.changes, own) if last else (own, stage.changes):
            config = _merged(config, changes)
        built = from_dict(config)
        every = self.settings.eval_every if last else 0
        return dataclasses.replace(
            built,
            name=f"{built.name} {arm}",
            data=dataclasses.replace(built.data, root=self.base.data.root, held_out=0.0),
            eval=dataclasses.replace(built.eval, path="", image_root="", limit=0),
            checkpoint=CheckpointConfig(every or built.checkpoint.every, keep=1, keep_every=every),
            total_steps=stage.steps,
        )

    @property
    def eval_files(self) -> dict[str, EvalSetConfig]:
        """The different files of questions, each once, under the first name that it has."""
        files: dict[tuple[str, str], EvalSetConfig] = {}
        for each in self.settings.evals:
            files.setdefault((each.path, each.image_root), each)
        return {each.name: each for each in files.values()}

    def file_of(self, eval_set: EvalSetConfig) -> str:
        """The name under which the file of an evaluation set is answered."""
        wanted = eval_set.path, eval_set.image_root
        return next(n for n, e in self.eval_files.items() if (e.path, e.image_root) == wanted)


def from_config(config: Mapping[str, Any], folder: str | Path) -> Comparison:
    """Checks a config (a ConfigDict, or plain JSON) and locates its data; raises ConfigError."""
    raw = json.loads(json.dumps(plain(config)))
    if not isinstance(raw.get("compare"), dict):
        raise ConfigError(
            "the config has no section `compare` that names arms, evals and stage2: see "
            "configs/compare_meter.py"
        )
    settings = build(CompareConfig, raw["compare"], "config.compare")
    _check(settings)
    base = from_dict({key: value for key, value in raw.items() if key != "compare"})
    if base.data.bins:
        raise ConfigError("config.data.bins: a comparison trains on parts of the data, unpacked")
    if base.tower_from:
        raise ConfigError("config.tower_from: the towers of a comparison are compare.encoders")
    base = dataclasses.replace(locate(base, folder), eval=EvalConfig())
    root = Path(base.data.root)
    located = tuple(
        dataclasses.replace(
            each,
            path=str(root / each.path),
            image_root=str(root / each.image_root) if each.image_root else "",
        )
        for each in settings.evals
    )
    comparison = Comparison(raw, base, dataclasses.replace(settings, evals=located))
    if not base.data.held_out and (settings.select or settings.eval_every):
        raise ConfigError(
            "config.data.held_out is 0: selections and compare.eval_every need held-out pictures"
        )
    for arm in settings.arms:
        _check_arm(comparison, arm)
    _check_packing(comparison)
    return comparison


def _check(c: CompareConfig) -> None:
    names = [arm.name for arm in c.arms]
    for what, found in (
        ("arms", names),
        ("evals", [each.name for each in c.evals]),
        ("encoders", [each.name for each in c.encoders]),
        ("seeds", c.seeds),
        ("fractions", c.fractions),
        ("arms and select", [*names, *(each.name for each in c.select)]),
    ):
        if not found or len(set(found)) != len(found):
            raise ConfigError(f"config.compare.{what} must not be empty or repeat: {list(found)}")
    for name in (*names, *(e.name for e in c.evals), *(e.name for e in c.encoders)):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"config.compare: the name {name!r} becomes a folder: use letters, digits and _.+=-"
            )
    if unusable := [each.name for each in c.select if "/" in each.name]:
        raise ConfigError(f"config.compare.select: {unusable[0]!r} becomes a file: no '/' in it")
    if unusable := [each.name for each in c.evals if each.name.startswith(HELD_OUT)]:
        raise ConfigError(
            f"config.compare.evals: {unusable[0]!r} would be mixed up with the held-out "
            f"pictures: choose a name that does not begin with {HELD_OUT!r}"
        )
    for each in c.select:
        if not each.arms or len(set(each.arms)) != len(each.arms):
            raise ConfigError(
                f"config.compare.select: the arms of {each.name!r} must not be empty or repeat: "
                f"{list(each.arms)}"
            )
    for name in (c.baseline, *(name for each in c.select for name in each.arms)):
        if name not in names:
            raise ConfigError(f"config.compare: there is no arm {name!r}; the arms are {names}")
    if not next(arm for arm in c.arms if arm.name == c.baseline).reported:
        raise ConfigError(f"config.compare.baseline: the arm {c.baseline!r} is not reported")
    shown = [*(arm.name for arm in c.arms if arm.reported), *(each.name for each in c.select)]
    for name in (name for each in c.contrasts for name in (each.arm, each.against)):
        if name not in shown:
            raise ConfigError(
                f"config.compare.contrasts: {name!r} is no reported arm and no selection; there "
                f"are {shown}"
            )
    chosen = {name for each in c.select for name in each.arms}
    for arm in c.arms:
        if not arm.reported and arm.name not in chosen:
            raise ConfigError(
                f"config.compare: the arm {arm.name!r} is neither reported nor in a selection"
            )
    if not all(0 < f <= 1 for f in c.fractions):
        raise ConfigError("config.compare.fractions must be in (0, 1]")
    if c.stage2.steps < 1 or c.stage1.steps < 0 or c.eval_every < 0 or c.draws < 1:
        raise ConfigError(
            "config.compare: stage2.steps and draws are at least 1, others at least 0"
        )


def _check_arm(comparison: Comparison, arm: ArmConfig) -> None:
    c = comparison.settings
    for what, changes, allowed in (
        (f"the arm {arm.name!r}", arm.changes, _ARM_MAY_CHANGE),
        ("stage1", c.stage1.changes, _STAGE_MAY_CHANGE),
        ("stage2", c.stage2.changes, _STAGE_MAY_CHANGE),
    ):
        if refused := sorted(set(changes) - set(allowed)):
            raise ConfigError(
                f"config.compare: {what} changes {refused}, which all arms and stages share; it "
                f"may change {list(allowed)}"
            )
    for stage in (c.stage1, c.stage2):
        try:
            built = comparison.experiment(arm.name, stage)
        except ValueError as error:  # of the strategy's registry or config
            raise ConfigError(f"config.compare: the arm {arm.name!r}: {error}") from error
        for part in ("vision", "text", "image", "has_newline"):
            if getattr(built.model, part) != getattr(comparison.base.model, part):
                raise ConfigError(
                    f"config.compare: the arm {arm.name!r} changes model.{part}, which all share"
                )


def _check_packing(comparison: Comparison) -> None:
    """Pictures of different sizes fill packed rows differently: updates would differ in samples."""
    if not comparison.base.data.pack:
        return
    extras = {
        arm.name: comparison.experiment(arm.name, comparison.settings.stage2).extras
        for arm in comparison.settings.arms
    }
    first, *others = extras
    if different := [name for name in others if extras[name] != extras[first]]:
        raise ConfigError(
            f"config.compare: the pictures of the arm {different[0]!r} have other sizes than those "
            f"of {first!r}, so packed rows would hold other samples: set config.data.pack=False"
        )


def _merged(config: Any, changes: Any) -> Any:
    if not isinstance(config, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**config, **{key: _merged(config.get(key), new) for key, new in changes.items()}}
