"""A Hugging Face checkpoint as an experiment, so that it can be asked and looked into as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cli_jax.experiment import DataConfig, Experiment, from_dict
from cli_jax.hf.adapter import read_adapter
from cli_jax.hf.checkpoint import read
from cli_jax.hf.source import read_json


def is_checkpoint(folder: str | Path) -> bool:
    """Whether the folder's config.json is Hugging Face's, not a run's."""
    path = Path(folder) / "config.json"
    return path.is_file() and "model_type" in read_json(path)


def describe(folder: str | Path, dtype: str) -> Experiment:
    """The experiment of a LLaVA checkpoint in any known naming, computed in `dtype`.

    The tokenizer is the folder's, the template that of the decoder's family; an adapter in the
    folder brings its fusion strategy and routing, `none` without one. Raises ConversionError.
    """
    folder = Path(folder)
    checkpoint = read(folder)
    adapter = read_adapter(folder)
    name, fusion = (adapter.fusion_name, adapter.fusion) if adapter else ("none", {})
    routing = adapter.routing if adapter else {"name": "none"}
    # A routing wants some limit; rows of questions are sized by what they hold.
    text_per_row = 0 if routing["name"] == "none" else DataConfig.row_length
    return from_dict(
        {
            "name": folder.absolute().name,
            "model": {
                "vision": dataclasses.asdict(checkpoint.vision),
                "text": dataclasses.asdict(checkpoint.text),
                "image": dataclasses.asdict(checkpoint.image),
                "has_newline": checkpoint.has_newline,
            },
            "fusion": {"name": name, name: fusion},
            "routing": routing,
            "data": {
                "tokenizer": str(folder),
                "template": checkpoint.template,
                "text_per_row": text_per_row,
            },
            "compute": {"dtype": dtype, "remat": "none"},
        }
    )
