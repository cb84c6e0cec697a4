"""From LLaVA JSON to packed batches. Without jax; only pipeline.py and *stream.py import Grain."""

from cli_jax.data.collate import Sizes, collate
from cli_jax.data.context import check_prompt_context
from cli_jax.data.sample import Sample, SampleSpec, TooLong, make_prompt_sample, make_sample
from cli_jax.data.sources import DataError, RowError, RowFile

__all__ = [
    "DataError",
    "RowError",
    "RowFile",
    "Sample",
    "SampleSpec",
    "Sizes",
    "TooLong",
    "check_prompt_context",
    "collate",
    "make_prompt_sample",
    "make_sample",
]
