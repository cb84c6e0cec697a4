"""The `prompt` gate context and its condition on the labels (docs/method.md section 1)."""

from __future__ import annotations

import numpy as np

from cli_jax.batch import IGNORE, Batch
from cli_jax.data.sample import Sample
from cli_jax.experiment import ConfigError


def check_prompt_context(data: Batch | Sample) -> None:
    """Raises ConfigError if a label stands between an image and its context end e_i.

    With the gate context `prompt` every token before e_i reaches the image's positions through the
    gate, so such a target would be predicted from itself.
    """
    if isinstance(data, Sample):
        _check(data.labels, data.visual_position, data.visual_image, data.context_end, data.id)
        return
    for b, labels in enumerate(data["labels"]):
        used = np.count_nonzero(data["image_segment"][b])
        _check(
            labels,
            data["visual_position"][b],
            data["visual_image"][b],
            data["context_end"][b, :used],
            f"of row {b}",
        )


def _check(
    labels: np.ndarray,
    visual_position: np.ndarray,
    visual_image: np.ndarray,
    context_end: np.ndarray,
    name: str,
) -> None:
    for image, end in enumerate(context_end):
        start = visual_position[visual_image == image].max() + 1
        found = np.flatnonzero(labels[start:end] != IGNORE)
        if len(found):
            raise ConfigError(
                f"the gate context `prompt` needs labels without loss between an image and the "
                f"answer, but sample {name} has a label at token {start + found[0]}, before its "
                f"answer at {end}; set data.labels=answer_only"
            )
