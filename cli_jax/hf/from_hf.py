"""`convert.py from-hf`: a checkpoint in any known naming -> one normalized folder.

The tensors are copied byte for byte, a block at a time, under the names of the llava-hf
repositories; the folder serves `config.init_from` and transformers alike. No jax here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from cli_jax.hf.adapter import check_base, read_adapter
from cli_jax.hf.checkpoint import read
from cli_jax.hf.config_out import image_token
from cli_jax.hf.error import ConversionError
from cli_jax.hf.save import Model, write_model, write_report
from cli_jax.hf.source import ADAPTER_WEIGHTS, resolve
from cli_jax.hf.write import output_folder


def from_hf(
    source: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    vocab_size: int | None = None,
    image_token_id: int | None = None,
    adapter: str | Path | None = None,
    max_shard_gb: float = 5.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Normalizes a checkpoint into the folder `out`; returns the report (conversion.json).

    vision: a CLIP or SigLIP checkpoint for what `source` lacks. vocab_size: appends vocabulary
    rows. adapter: a folder with an adapter of this base model, which joins it in `out`
    (one that lies in `source` does anyway).
    """
    checkpoint = read(source, vision=vision, vocab_size=vocab_size)
    found = read_adapter(checkpoint.source.folder if adapter is None else resolve(adapter))
    if found is not None:
        check_base(found, checkpoint.tensors)
    elif adapter is not None:
        raise ConversionError(f"{adapter} holds no {ADAPTER_WEIGHTS}")
    tokens = dict(checkpoint.tokens)
    if image_token_id is not None:
        tokens["image_token_index"] = image_token_id
    model = Model(
        checkpoint.vision,
        checkpoint.text,
        checkpoint.image,
        checkpoint.has_newline,
        tokens,
        checkpoint.tensors,
        checkpoint.appended_from,
    )
    notes = list(checkpoint.notes)
    token = image_token(tokens, checkpoint.text, checkpoint.appended_from)
    if token >= checkpoint.text.vocab_size:
        notes.append(
            f"the <image> id {token} has no vocabulary row; training does not need one, but"
            " transformers does (--vocab_size)"
        )
    with output_folder(out) as folder:
        write_model(
            folder,
            model,
            side_folders=[checkpoint.source.folder],
            max_shard_gb=max_shard_gb,
            progress=progress,
        )
        for file in found.files if found else ():
            shutil.copyfile(file, folder / file.name)
        return write_report(
            folder,
            f"from-hf {source}",
            checkpoint.tensors,
            checkpoint.origin,
            checkpoint.absent,
            notes,
        )
