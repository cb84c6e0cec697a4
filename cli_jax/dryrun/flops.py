"""Model FLOPs, counted from the shapes: what the mathematics needs, whatever the compiler does.

A product of [m, k] and [k, n] is 2mkn. Norms, activations and softmax are left out, and so is what
rematerialization computes twice. The compiler's own count is no help: it counts a scan's body once.

A backward pass costs a part as much again for the gradient of its weights, if they are trained, and
as much for the gradient of its inputs, if anything upstream is.
"""

from __future__ import annotations

from collections.abc import Mapping

from cli_jax import routing
from cli_jax.config import ModelConfig, VisionConfig
from cli_jax.data.collate import Sizes
from cli_jax.experiment import Experiment
from cli_jax.fusion import registry
from cli_jax.fusion.base import Row

# In the order in which features pass them. `fusion` is what a strategy other than CLI adds; `side`
# and `late` are DPVR's (routing/dpvr.py).
PARTS = ("vision", "fusion", "projector", "amp", "agf", "decoder", "side", "late", "head")
OWNERS = {  # prefix of a parameter's path -> part; the first that matches
    "vision_tower/": "vision",
    "multi_modal_projector/": "projector",
    "image_newline": "projector",
    "fusion/amp/": "amp",
    "fusion/agf/": "agf",
    "fusion/": "fusion",
    "routing/": "side",
    "lm_head/": "head",
    "language_model/": "decoder",
}
Flops = dict[str, float]


def row_of(experiment: Experiment) -> Row:
    """A row of a config, filled to the last slot."""
    sizes = Sizes.from_config(experiment.data, experiment.model.vision, 1, experiment.extras)
    return Row(sizes.length, sizes.visual, sizes.tiles, sizes.images, sizes.text)


def forward(model: ModelConfig, row: Row) -> Flops:
    """FLOPs of one row's forward pass, by part."""
    strategy = registry.of(model)
    layers = strategy.vision_layers(model.fusion, model.vision)[-1]
    total = dict.fromkeys(PARTS, 0.0)
    total["vision"] = row.tiles * _vision(model.vision, layers)
    total |= routing.of(model).flops(model, row)
    for part, flops in strategy.flops(model.fusion, model, row).items():
        total[part] += flops
    return total


def step(model: ModelConfig, row: Row, rows: int, rates: Mapping[str, float | None]) -> Flops:
    """FLOPs of an update of `rows` rows, forward and backward, by part."""
    trained = {part_of(path) for path, rate in rates.items() if rate is not None}
    if "decoder" in trained:
        trained |= {"late", "head"} if model.text.tie_word_embeddings else {"late"}
    forward_flops = forward(model, row)
    upstream = False
    total = {}
    for part in PARTS:
        own = part in trained
        total[part] = rows * forward_flops[part] * (1 + own + (own or upstream))
        upstream = upstream or own
    return total


def part_of(path: str) -> str:
    """The part that a parameter belongs to."""
    return next(part for prefix, part in OWNERS.items() if path.startswith(prefix))


def _vision(c: VisionConfig, layers: int) -> float:
    """One tile through `layers` blocks."""
    V, tokens = c.hidden_size, c.num_patches + (c.model_type == "clip")
    patches = 2.0 * c.num_patches * c.patch_size**2 * 3 * V
    weights = 4 * V * V + 2 * V * c.intermediate_size
    return patches + layers * (2.0 * tokens * weights + 4.0 * tokens**2 * V)
