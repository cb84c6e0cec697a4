"""`convert.py compose`: a separate vision tower and language model -> one folder for stage 1.

Both are copied byte for byte; the projector (unless given) and the newline are left to the model,
which initializes them when training starts. No jax here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cli_jax.config import ImageConfig
from cli_jax.hf import names
from cli_jax.hf.checkpoint import Table, compare
from cli_jax.hf.config import (
    CLIP_MEAN,
    CLIP_STD,
    ONEVISION_PINPOINTS,
    SIGLIP_MEAN,
    SIGLIP_STD,
    text_config,
    vision_config,
)
from cli_jax.hf.error import ConversionError
from cli_jax.hf.save import Model, write_model, write_report
from cli_jax.hf.source import Source, open_source
from cli_jax.hf.write import output_folder


def compose(
    out: str | Path,
    *,
    vision: str | Path,
    language: str | Path,
    projector: str | Path | None = None,
    vision_layers: int | None = None,
    vocab_size: int | None = None,
    max_shard_gb: float = 5.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Joins checkpoints into the folder `out`; returns the report (conversion.json).

    vision: SigLIP or CLIP, alone or with its text tower. language: Qwen2 or LLaMA. projector: a
    safetensors file or folder of stage 1. vision_layers: by default all for CLIP and all but the
    last for SigLIP. vocab_size: appends vocabulary rows.
    Raises one ConversionError that lists every missing, wrong or extra tensor.
    """
    tower, decoder = _with_config(vision, "vision"), _with_config(language, "language")
    vision_cfg = vision_config(tower.config, layers=vision_layers)
    text_cfg = text_config(decoder.config)
    onevision = vision_cfg.model_type == "siglip"
    table = Table()
    table.add(tower, only_tower=True)
    table.drop_layers(vision_cfg.num_hidden_layers)
    table.add(decoder)
    if projector is not None:
        table.add(open_source(projector))
    if text_cfg.tie_word_embeddings:
        table.drop_tied_head()
    if vocab_size is not None:
        text_cfg = dataclasses.replace(text_cfg, vocab_size=vocab_size)
        table.pad_vocabulary(vocab_size)
    wanted = names.expected(vision_cfg, text_cfg, has_newline=onevision)
    open_parts = ("image_newline",) if projector else ("image_newline", "multi_modal_projector")
    absent = [n for n in wanted if n.split(".")[0] in open_parts and n not in table.tensors]
    problems = compare({n: s for n, s in wanted.items() if n not in absent}, table.tensors)
    if problems:
        raise ConversionError("\n  ".join([f"these do not make a model of {out}:", *problems]))
    tensors = {n: table.tensors[n] for n in wanted if n not in absent}
    model = Model(
        vision_cfg,
        text_cfg,
        _image(onevision),
        has_newline=onevision,
        tokens={k: v for k, v in decoder.config.items() if k.endswith("os_token_id")},
        tensors=tensors,
        appended_from=table.appended_from,
    )
    with output_folder(out) as folder:
        write_model(
            folder,
            model,
            side_folders=[decoder.folder],
            own_preprocessor=True,
            max_shard_gb=max_shard_gb,
            progress=progress,
        )
        return write_report(folder, "compose", tensors, table.origin, absent, table.notes)


def _with_config(where: str | Path, what: str) -> Source:
    source = open_source(where)
    if not source.config:
        raise ConversionError(f"--{what} {where} has no config.json")
    return source


def _image(onevision: bool) -> ImageConfig:
    """What the finished model would use; stage 1's own treatment is in its experiment config."""
    if onevision:
        return ImageConfig(
            grid_pinpoints=ONEVISION_PINPOINTS, image_mean=SIGLIP_MEAN, image_std=SIGLIP_STD
        )
    return ImageConfig(
        aspect_ratio="pad", multi_image="same", image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
