"""`convert.py to-hf`: a training checkpoint -> a folder that transformers loads.

The base model goes out under the llava-hf names; what a fusion strategy and a routing added goes
into the adapter files next to it, bound to the base by its fingerprint.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from cli_jax.fusion import registry
from cli_jax.hf import names
from cli_jax.hf.adapter import write_adapter
from cli_jax.hf.checkpoint import EMBEDDING, HEAD
from cli_jax.hf.config import llava_config
from cli_jax.hf.config_out import is_onevision
from cli_jax.hf.error import ConversionError
from cli_jax.hf.save import Array, Model, Stored, cast, stored_tensors, write_model, write_report
from cli_jax.hf.source import open_source, read_json
from cli_jax.hf.tensor import Cast, PaddedVocabulary
from cli_jax.hf.tensorfile import DTYPES
from cli_jax.hf.workdir import TrainingCheckpoint, open_workdir
from cli_jax.hf.write import output_folder

DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


def to_hf(
    where: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str = "keep",
    vocab_size: int | None = None,
    image_token_id: int | None = None,
    tokenizer: str | Path | None = None,
    adapter_only: bool = False,
    max_shard_gb: float = 5.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a workdir's model (or one checkpoint folder of it) to `out`; returns the report.

    dtype: of the base model on disk, or `keep`. vocab_size: appends vocabulary rows. tokenizer: a
    folder with tokenizer files, by default the one the run used. adapter_only: only the
    parameters that the base model does not have, for whoever has that.
    """
    checkpoint = open_workdir(where, step)
    model = checkpoint.experiment.model
    names.check_projector(model)
    checkpoint.verify(progress=progress)
    has_projector = registry.of(model).has_plain_projector(model.fusion)
    tensors, own_arrays = stored_tensors(checkpoint.arrays, model, has_projector=has_projector)
    own = {path: _whole(path, array) for path, array in own_arrays.items()}
    command = f"to-hf {checkpoint.workdir} (step {checkpoint.step})"
    if adapter_only:
        if not own:
            raise ConversionError(
                f"config.fusion.name={model.fusion_name} and config.routing.name="
                f"{model.routing.name} have no parameters: nothing to share"
            )
        with output_folder(out) as folder:
            write_adapter(folder, model, own, tensors)
            return write_report(folder, command, {}, {}, (), [_adapter_note(model, own)])
    text, appended_from = model.text, None
    if dtype != "keep":
        tensors = cast(tensors, DTYPE_NAMES[dtype])
    notes = []
    if vocab_size is not None:
        if vocab_size < text.vocab_size:
            raise ConversionError(
                f"--vocab_size {vocab_size}: the model has {text.vocab_size} rows"
            )
        notes.append(f"{vocab_size - text.vocab_size} vocabulary rows appended (mean row)")
        appended_from = text.vocab_size if vocab_size > text.vocab_size else None
        text = dataclasses.replace(text, vocab_size=vocab_size)
        for name in {EMBEDDING, HEAD} & set(tensors):
            tensors[name] = PaddedVocabulary(tensors[name], vocab_size)
    tokens = _tokens(checkpoint)
    if image_token_id is not None:
        tokens["image_token_index"] = image_token_id
    sides = _side_folders(checkpoint, tokenizer)
    with output_folder(out) as folder:
        copied = write_model(
            folder,
            Model(
                model.vision, text, model.image, model.has_newline, tokens, tensors, appended_from
            ),
            side_folders=sides,
            own_preprocessor=True,
            needs_image_token=True,
            max_shard_gb=max_shard_gb,
            progress=progress,
        )
        if not any(name.startswith("tokenizer") for name in copied):
            wanted = checkpoint.experiment.data.tokenizer or "none named in the config"
            notes.append(f"no tokenizer files copied ({wanted}): give a folder with --tokenizer")
        if model.has_newline and not is_onevision(model.image):
            notes.append(
                "image_newline is in the file, but transformers' LLaVA with one tile per picture"
                " has none and leaves it out"
            )
        lossy = [t.name for t in tensors.values() if isinstance(t, Cast) and t.lossy]
        if lossy:
            notes.append(f"{len(lossy)} tensors lost precision in {dtype}, e.g. {lossy[0]}")
        if own:
            written = open_source(folder).tensors
            base = {name: written[names.hub(name)] for name in tensors}
            write_adapter(folder, model, own, base)
            notes.append(_adapter_note(model, own))
        whole = names.expected(model.vision, model.text, has_newline=model.has_newline)
        absent = [name for name in whole if name not in tensors]
        if absent:
            notes.append(
                f"fusion strategy {model.fusion_name!r} does without LLaVA's projector;"
                " transformers would draw one at random: this folder serves config.init_from only"
            )
        origin = dict.fromkeys(tensors, f"{checkpoint.workdir}")
        return write_report(folder, command, tensors, origin, absent, notes)


def _whole(path: str, array: Array) -> Stored:
    shape = tuple(array.shape)
    return Stored(array, names.Leaf(path, (path,), False, tuple(range(len(shape))), shape), None)


def _adapter_note(model: Any, own: dict[str, Stored]) -> str:
    count = sum(int(np.prod(t.shape)) for t in own.values())
    return (
        f"cli_adapter.*: {count:,} parameters of fusion strategy {model.fusion_name!r} and routing"
        f" {model.routing.name!r}; transformers loads the base model without them"
    )


def _side_folders(checkpoint: TrainingCheckpoint, tokenizer: str | Path | None) -> list[Path]:
    experiment = checkpoint.experiment
    candidates = [tokenizer] if tokenizer else [experiment.data.tokenizer, experiment.init_from]
    folders = [Path(c).expanduser() for c in candidates if c]
    if tokenizer and not folders[0].is_dir():
        raise ConversionError(f"--tokenizer {tokenizer} is no folder")
    return [folder for folder in folders if folder.is_dir()]


def _tokens(checkpoint: TrainingCheckpoint) -> dict[str, Any]:
    """Special token ids of the Hugging Face checkpoint the run started from, if it is here."""
    folder = checkpoint.experiment.init_from
    if not folder or not (Path(folder) / "config.json").is_file():
        return {}
    values = read_json(Path(folder) / "config.json")
    return llava_config(values).tokens if "text_config" in values else {}
