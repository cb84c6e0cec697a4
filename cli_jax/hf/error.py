"""The one error of this package: what is wrong with a checkpoint, and the remedy."""

from __future__ import annotations


class ConversionError(ValueError):
    """A checkpoint, adapter or output folder that cannot be used as asked."""
