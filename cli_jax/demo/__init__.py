"""Data and a tokenizer that come with the package, so that a fresh clone can train at once."""

from cli_jax.demo.prepare import MAKERS, prepare
from cli_jax.demo.vocabulary import FOLDER as TOKENIZER

__all__ = ["MAKERS", "TOKENIZER", "prepare"]
