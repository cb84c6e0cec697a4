"""A LLaVA checkpoint on disk, whatever its naming and wherever its tower: one table of tensors.

`read` opens it, undoes the naming, cuts the tower to the layers that are used, settles tied
embeddings and vocabulary rows, and compares everything with what is expected. It reads no tensor
except to compare a tied head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cli_jax.config import ImageConfig, ModelConfig, TextConfig, VisionConfig
from cli_jax.hf import names
from cli_jax.hf.config import HFConfig, differences, llava_config, vision_config
from cli_jax.hf.error import ConversionError
from cli_jax.hf.source import Source, open_source, read_json
from cli_jax.hf.tensor import PaddedVocabulary, Tensor, same_values

CONVERSION = "conversion.json"  # what a conversion did; lists what the model initializes itself
EMBEDDING, HEAD, NEWLINE = "language_model.embed_tokens.weight", "lm_head.weight", "image_newline"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """tensors: by canonical name, unread. origin: where each comes from, for reports.

    absent: canonical names that the model initializes itself. notes: what was left out or added.
    appended_from: the first vocabulary row that was added, if any was.
    """

    source: Source
    vision: VisionConfig
    text: TextConfig
    image: ImageConfig
    has_newline: bool
    tokens: dict[str, Any]
    tensors: dict[str, Tensor]
    origin: dict[str, str]
    absent: tuple[str, ...]
    notes: tuple[str, ...]
    appended_from: int | None

    @property
    def template(self) -> Literal["qwen_1_5", "v1"]:
        """The chat template of the decoder's family (`data.template`); no file says it."""
        return "qwen_1_5" if self.text.model_type == "qwen2" else "v1"


def read(
    where: str | Path,
    *,
    vision: str | Path | None = None,
    model: ModelConfig | None = None,
    vocab_size: int | None = None,
) -> Checkpoint:
    """Opens and checks a whole model.

    vision: a vision checkpoint for what `where` lacks (LLaVA-1.5's original files hold no tower).
    model: what it must fit; by default what its own config.json says.
    vocab_size: appends vocabulary rows up to this count (`tensor.PaddedVocabulary`).
    Raises one ConversionError that lists every difference with expected and found shapes.
    """
    source = open_source(where)
    config, tower = _config(source, vision)
    problems: list[str] = []
    target_vision, target_text, has_newline = tower, config.text, config.has_newline
    if model is not None:
        problems += [f"config {line}" for line in differences(tower, model.vision)]
        problems += [f"config {line}" for line in differences(config.text, model.text)]
        target_vision, target_text, has_newline = model.vision, model.text, model.has_newline
    if vocab_size is not None:
        target_text = dataclasses.replace(target_text, vocab_size=vocab_size)
    table = Table()
    table.add(source)
    if vision is not None:
        table.add(open_source(vision), only_tower=True)
    if model is None:  # LLaVA-OneVision's own first stage has the newline and does not use it
        has_newline = has_newline or NEWLINE in table.tensors
    wanted = names.expected(target_vision, target_text, has_newline=has_newline)
    table.drop_layers(target_vision.num_hidden_layers)
    if target_text.tie_word_embeddings:
        table.drop_tied_head()
    if vocab_size is not None:
        table.pad_vocabulary(vocab_size)
    absent = tuple(
        name for name in wanted if name not in table.tensors and name in _may_lack(source, wanted)
    )
    problems += compare({n: s for n, s in wanted.items() if n not in absent}, table.tensors)
    if problems:
        raise ConversionError(_report(where, problems, wanted, table.tensors))
    return Checkpoint(
        source=source,
        vision=target_vision,
        text=target_text,
        image=config.image,
        has_newline=has_newline,
        tokens=config.tokens,
        tensors={name: table.tensors[name] for name in wanted if name not in absent},
        origin=table.origin,
        absent=absent,
        notes=tuple(table.notes),
        appended_from=table.appended_from,
    )


class Table:
    """Tensors collected under canonical names, with what was left out and why."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.origin: dict[str, str] = {}
        self.notes: list[str] = []
        self.appended_from: int | None = None

    def add(self, source: Source, *, only_tower: bool = False) -> None:
        """Adds a source's tensors; what is there already stays (a tower trained further)."""
        ignored = []
        for stored, tensor in source.tensors.items():
            name = names.canonical(stored, tower=only_tower)
            if name is None:
                ignored.append(stored)
                continue
            if name in self.tensors:
                if not only_tower:
                    raise ConversionError(
                        f"{stored} and {self.origin[name]} are both {name} in {source.path}"
                    )
                continue
            self.tensors[name] = tensor
            self.origin[name] = f"{tensor.file}: {stored}"
        if ignored:
            self.notes.append(f"{len(ignored)} tensors not part of the model, e.g. {ignored[0]}")

    def drop_layers(self, layers: int) -> None:
        """Leaves out vision layers behind the last one used (SigLIP's 27th)."""
        unused = [n for n in self.tensors if (names.vision_layer(n) or 0) >= layers]
        if unused:
            first = names.vision_layer(unused[0])
            self.notes.append(f"vision layers from {first} on are not used: {len(unused)} tensors")
        for name in unused:
            del self.tensors[name], self.origin[name]

    def drop_tied_head(self) -> None:
        """Leaves out a stored copy of a tied head, if it is one."""
        if HEAD not in self.tensors or EMBEDDING not in self.tensors:
            return
        if not same_values(self.tensors[HEAD], self.tensors[EMBEDDING]):
            raise ConversionError(
                f"{self.origin[HEAD]} differs from the embedding although the config says"
                " tie_word_embeddings: set it to false in config.json if the head was trained apart"
            )
        self.notes.append(f"{HEAD} equals the tied embedding: left out")
        del self.tensors[HEAD], self.origin[HEAD]

    def pad_vocabulary(self, rows: int) -> None:
        for name in (EMBEDDING, HEAD):
            tensor = self.tensors.get(name)
            if tensor is not None and tensor.shape[0] < rows:
                self.tensors[name] = PaddedVocabulary(tensor, rows)
                self.appended_from = tensor.shape[0]
                added = rows - tensor.shape[0]
                self.notes.append(f"{name}: {added} rows appended, each the mean of the others")


def compare(wanted: Mapping[str, names.Shape], tensors: Mapping[str, Tensor]) -> list[str]:
    """One line for every missing, extra or misshapen tensor."""
    lines = [f"missing {n}: expected {list(s)}" for n, s in wanted.items() if n not in tensors]
    lines += [
        f"wrong   {n}: expected {list(s)}, found {list(tensors[n].shape)}"
        for n, s in wanted.items()
        if n in tensors and tuple(tensors[n].shape) != s
    ]
    return lines + [
        f"extra   {n}: found {list(t.shape)}" for n, t in tensors.items() if n not in wanted
    ]


def _config(source: Source, vision: str | Path | None) -> tuple[HFConfig, VisionConfig]:
    if not source.config:
        raise ConversionError(f"{source.path} has no config.json next to its tensors")
    preprocessor = source.folder / "preprocessor_config.json"
    config = llava_config(source.config, read_json(preprocessor) if preprocessor.is_file() else {})
    tower = config.vision if vision is None else vision_config(open_source(vision).config)
    if tower is None:
        raise ConversionError(
            f"{source.path} names its vision tower ({source.config.get('mm_vision_tower')}) but"
            " does not describe it: give its folder with --vision"
        )
    return config, tower


def _may_lack(source: Source, wanted: Mapping[str, names.Shape]) -> set[str]:
    """The newline (LLaVA-1.5 has none), and what the conversion that wrote this left open."""
    report = source.folder / CONVERSION
    given = read_json(report).get("initialize", []) if report.is_file() else []
    return {NEWLINE, *given} & set(wanted)


def _report(
    where: str | Path,
    problems: list[str],
    wanted: Mapping[str, names.Shape],
    tensors: Mapping[str, Tensor],
) -> str:
    lines = [f"{where} does not fit the model ({len(problems)} differences):", *problems]
    found = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None
    rows = wanted[EMBEDDING][0]
    if found is not None and found != rows:
        lines.append(
            f"the checkpoint has {found} vocabulary rows: set config.model.text.vocab_size={found}"
            + (f", or convert it with --vocab_size {rows}" if found < rows else "")
        )
    if any("vision_tower." in line and line.startswith("missing") for line in problems):
        lines.append("a checkpoint without its vision tower needs --vision FOLDER in convert.py")
    return "\n  ".join(lines)
