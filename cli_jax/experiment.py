"""What a run is: the config file's values, checked and frozen once, at the door.

`from_dict` turns nested dictionaries (an `ml_collections.ConfigDict` or the `config.json` of a
workdir) into the dataclasses below; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cli_jax.config import (
    ComputeConfig,
    ConfigError,
    ImageConfig,
    ModelConfig,
    RoutingConfig,
    TextConfig,
    VisionConfig,
)
from cli_jax.image.extras import Extras
from cli_jax.output import read_json


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One LLaVA-format JSON or JSONL file, its pictures and its share of the mixture."""

    path: str
    image_root: str = ""  # empty: the folder of `path`
    weight: float = 1.0
    start: int = 0  # rows start:stop are used; cut before shuffling
    stop: int = 0  # 0 = to the end


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From files to packed rows. Lengths are static: they are the shapes that get compiled."""

    root: str = ""  # where relative paths of `train`, `bins`, `eval` start; empty: see `locate`
    prepare: str = ""  # a data set of cli_jax/demo that is made in `root` if it is not there
    train: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""  # a folder or a hub id
    template: Literal["qwen_1_5", "v1", "plain", "question_first"] = "qwen_1_5"
    labels: Literal["reference", "answer_only"] = "reference"
    batch_size: int = 8  # rows per update, over all devices and accumulation steps
    row_length: int = 1024  # L
    visual_per_row: int = 768  # P
    tiles_per_row: int = 2  # M; tiles that a strategy adds to pictures have room beside them
    images_per_row: int = 4  # I
    text_per_row: int = 0  # Q, for routing.name=dpvr: most text tokens of a row; 0 = no limit
    pack: bool = True  # several samples per row
    bins: str = ""  # which samples share a row, from cli_jax/data/prepare.py; empty: packed online
    turns: Literal["all", "one"] = "all"  # "one": a draw of a row trains on one random question
    augment: float = 0.0  # strength of random shifts and zoom, in [0, 1]; 0 = off
    jitter: float = 0.0  # strength of random changes of brightness, contrast and color
    # A row's questions and answers become one caption of this kind (cli_jax/data/captions.py)
    captions: Literal["", "coarse", "full"] = ""
    held_out: float = 0.0  # share of the scenes that is never trained on (cli_jax/data/parts.py)
    scene: str = ""  # ids that are equal without what this regular expression finds: one scene
    workers: int = 0  # Grain processes; 0 = in the training process
    max_bad_share: float = 0.01  # share of unreadable rows above which training stops
    strict: bool = False  # the first unreadable row is an error


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters whose path matches `pattern` (re.fullmatch): their rate, or frozen."""

    pattern: str
    lr: float | None = None  # None = frozen: no gradient, no optimizer state


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Warm-up, then a cosine to zero; the first matching group wins, then `lr`.

    `muon` orthogonalizes the updates of the layers' matrices and leaves the rest to AdamW. Both
    take the same rates. configs/nlvr_counts.py compares them on a model trained from nothing.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-5
    groups: tuple[GroupConfig, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # 0 = no clipping (LLaVA-1.5's recipe)
    accumulate: int = 1  # microbatches per update
    loss_average: Literal["tokens", "samples"] = "tokens"  # `samples`: the reference's bs=1 mean


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 takes what is left.

    With both `data` and `fsdp` at -1, `fsdp` is the largest size that divides the model's widths,
    so that every weight is split, and `data` takes what is left.
    """

    data: int = -1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 2
    keep_every: int = 0  # additionally keep every multiple of this step for good; 0 = none


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between metric lines
    profile: str = ""  # updates to trace, "10:13" = 10, 11 and 12, into <workdir>/profile
    # Seconds without a finished update after which the run ends with its stacks; 0 = never.
    stall_seconds: float = 1800.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What runs when training is done; an empty `path` means nothing does."""

    path: str = ""
    image_root: str = ""
    batch_size: int = 16
    max_new_tokens: int = 8
    limit: int = 0  # questions; 0 = all


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, complete."""

    name: str
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    compute: ComputeConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    eval: EvalConfig
    # What is trained: the model that answers, or its vision tower beforehand (cli_jax/pretrain)
    objective: Literal["next_token", "siglip"] = "next_token"
    seed: int = 0
    total_steps: int = 1000
    init_from: str = ""  # Hugging Face folder or hub id, converted folder, or a workdir
    tower_from: str = ""  # of the same kinds, or a .safetensors file: the vision tower only

    @property
    def extras(self) -> Extras:
        """What the fusion strategy adds to every picture; ConfigError if it cannot."""
        from cli_jax.fusion import registry  # the strategies' code, which data code does not load

        try:
            return registry.of(self.model).extras(self.model.fusion, self.model)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def from_dict(config: Mapping[str, Any]) -> Experiment:
    """Builds the experiment from nested mappings; every unknown key is refused."""
    from cli_jax import routing
    from cli_jax.fusion import registry  # the strategies' configs live with their code

    config = plain(config)
    known = {f.name for f in dataclasses.fields(Experiment)} | {"fusion", "routing"}
    _refuse_unknown("config", config, known)
    _refuse_missing("config", config, "model", "fusion")
    _refuse_missing("config.model", config["model"], "vision", "text", "image")
    model, fusion = dict(config["model"]), dict(config["fusion"])
    scalars_of_model = {"has_newline", "projector_width"}
    _refuse_unknown("config.model", model, {"vision", "text", "image", *scalars_of_model})
    name = fusion.pop("name")
    _refuse_unknown("config.fusion", fusion, set(registry.STRATEGIES))
    strategy = registry.get(name)
    sections = {
        f.name: build(_hints(Experiment)[f.name], config.get(f.name, {}), f"config.{f.name}")
        for f in dataclasses.fields(Experiment)
        if dataclasses.is_dataclass(_hints(Experiment)[f.name]) and f.name != "model"
    }
    scalars = {
        name: build(hint, config[name], f"config.{name}")
        for name, hint in _hints(Experiment).items()
        if name in config and not dataclasses.is_dataclass(hint)
    }
    experiment = Experiment(
        model=ModelConfig(
            vision=build(VisionConfig, model["vision"], "config.model.vision"),
            text=build(TextConfig, model["text"], "config.model.text"),
            image=build(ImageConfig, model["image"], "config.model.image"),
            fusion_name=name,
            fusion=build(strategy.Config, fusion.get(name, {}), f"config.fusion.{name}"),
            routing=build(RoutingConfig, config.get("routing", {}), "config.routing"),
            **{k: model[k] for k in scalars_of_model if k in model},
        ),
        **sections,
        **scalars,
    )
    _check_model(experiment.model)
    routing.of(experiment.model).check(experiment.model)
    if experiment.model.routing.name == "dpvr":
        _check_text_rows(experiment.data)
    return experiment


def _check_model(model: ModelConfig) -> None:
    """Refuses layers that the towers do not have, and pictures that the model cannot hold."""
    from cli_jax.fusion import registry
    from cli_jax.image.anyres import treatment

    try:
        kinds = {treatment(model.image, single=single).kind for single in (True, False)}
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from error
    strategy, config = registry.of(model), model.fusion
    try:
        strategy.vision_layers(config, model.vision)
        strategy.decoder_layers(config, model.text)
        strategy.extras(config, model)
    except ValueError as error:
        own = str(error).startswith("fusion.")  # it names its key
        where = "config." if own else f"config.fusion.{model.fusion_name}: "
        raise ConfigError(f"{where}{error}") from error
    if not model.has_newline and kinds & {"anyres", "pad_newline"}:
        raise ConfigError(
            f"config.model.has_newline=False, but pictures get newline tokens with "
            f"config.model.image.aspect_ratio={model.image.aspect_ratio} and multi_image="
            f"{model.image.multi_image}: set has_newline=True, or square, pad or crop with same"
        )


def _check_text_rows(data: DataConfig) -> None:
    if not 0 < data.text_per_row <= data.row_length:
        raise ConfigError(
            f"config.data.text_per_row={data.text_per_row}: config.routing.name=dpvr gathers a "
            f"row's text tokens into so many slots; give 1 to {data.row_length}, e.g. "
            f"{max(data.row_length - data.visual_per_row, 1)}"
        )
    if data.template == "plain":
        raise ConfigError(
            "config.data.template=plain begins the answer right behind the picture, and with "
            "config.routing.name=dpvr visual positions predict nothing: use another template"
        )


def locate(experiment: Experiment, workdir: str | Path) -> Experiment:
    """The experiment with absolute paths to its data, so that they mean the same from anywhere.

    Relative paths start in `data.root`; if that is empty, in `<workdir>/data` for a data set that
    is made on the spot (`data.prepare`), else in the current folder.
    """
    data, evaluation = experiment.data, experiment.eval
    root = Path(data.root or (Path(workdir) / "data" if data.prepare else ".")).absolute()

    def at_root(path: str) -> str:
        return str(root / path) if path else ""  # an absolute path stays as it is

    train = tuple(
        dataclasses.replace(
            source, path=at_root(source.path), image_root=at_root(source.image_root)
        )
        for source in data.train
    )
    return dataclasses.replace(
        experiment,
        data=dataclasses.replace(data, root=str(root), train=train, bins=at_root(data.bins)),
        eval=dataclasses.replace(
            evaluation,
            path=at_root(evaluation.path),
            image_root=at_root(evaluation.image_root),
        ),
    )


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """The inverse of `from_dict`, with plain JSON types only."""
    out = dataclasses.asdict(experiment)
    name, fusion = out["model"].pop("fusion_name"), out["model"].pop("fusion")
    out["fusion"] = {"name": name, name: fusion}
    out["routing"] = out["model"].pop("routing")
    return json.loads(json.dumps(out))


def load(workdir: str | Path) -> Experiment:
    """Reads the resolved config that training left in a workdir."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a --workdir that train.py has written")
    return from_dict(read_json(path))


def load_answering(workdir: str | Path) -> Experiment:
    """`load`, for whoever needs a whole model: refuses a vision tower that was trained alone."""
    experiment = load(workdir)
    if experiment.objective != "next_token":
        raise ConfigError(
            f"{workdir} holds a vision tower trained with config.objective={experiment.objective}, "
            f"not a model that answers: start one from it with --config.init_from={workdir}"
        )
    return experiment


def plain(value: Any) -> Any:
    """A config's values as dictionaries, lists and scalars."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _refuse_missing(where: str, given: Mapping[str, Any], *keys: str) -> None:
    if missing := [key for key in keys if key not in given]:
        raise ConfigError(f"{where}.{missing[0]} is missing")


def _refuse_unknown(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {sorted(known)}"
            raise ConfigError(f"unknown key {where}.{key}{hint}")


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(hint: Any, value: Any, where: str) -> Any:
    """Builds `value` as the annotated type, recursively; refuses wrong types by name."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        hints = _hints(typing.cast(type, hint))
        _refuse_unknown(where, value, set(hints))
        missing = [
            f.name
            for f in dataclasses.fields(hint)
            if f.name not in value
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{where} lacks {missing}")
        built = {k: build(hints[k], v, f"{where}.{k}") for k, v in value.items()}
        try:
            return typing.cast(Any, hint)(**built)
        except ValueError as error:  # the dataclass refuses a value
            raise ConfigError(str(error)) from error
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {list(args)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} entries, got {value!r}")
        return tuple(
            build(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin in (types.UnionType, typing.Union):
        for option in args:
            try:
                return build(option, value, where)
            except ConfigError:
                continue
        raise ConfigError(f"{where} must be one of {args}, got {value!r}")
    if hint is type(None):
        if value is not None:
            raise ConfigError(f"{where} must be None")
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
        return value
    return value
