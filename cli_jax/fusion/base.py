"""The interface of a fusion strategy.

A strategy declares which vision layers it taps, where it injects, its parameters (with logical
axes), what it puts at the decoder's input and what it adds inside. The decoder and the vision tower
know nothing of strategies: they are given layer indices and an `Injection`.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import apply_plan
from cli_jax.model.layers import Dtype
from cli_jax.model.projector import Projector

LayerSpec = tuple[int, ...] | str  # indices, "all", "every:m" or "last"


class Fused(NamedTuple):
    """A strategy's result.

    features   [B, P, D]  what stands at the decoder's input, zero on newline and padding slots
    injection             what happens inside the decoder, or None
    """

    features: jax.Array
    injection: Injection | None


class Fusion(nn.Module):
    """Base class: subclasses set `Config` and override the declarations and `__call__`."""

    model: ModelConfig
    unroll: bool
    remat: str
    dtype: Dtype
    param_dtype: Dtype

    Config: ClassVar[type]

    @classmethod
    def vision_layers(cls, config: Any, vision: VisionConfig) -> tuple[int, ...]:
        """Ascending vision layer indices the tower must emit (docs/method.md section 0)."""
        raise TypeError(f"{cls.__name__} must declare its vision layers")

    @classmethod
    def decoder_layers(cls, config: Any, text: TextConfig) -> tuple[int, ...]:
        """Decoder layers before which something is added; empty for input-side strategies."""
        return ()

    @classmethod
    def needs_prompt_context(cls, config: Any) -> bool:
        """Whether image positions see the question: its labels must then be ignored."""
        return False


def tap_layers(spec: LayerSpec, vision: VisionConfig) -> tuple[int, ...]:
    """Vision layers of a spec: `all` = 1..V_last, `every:m` counts back from V_last."""
    last = vision.last_layer
    if spec == "last":
        return (last,)
    if spec == "all":
        return tuple(range(1, last + 1))
    if isinstance(spec, str):
        return tuple(sorted(range(last, 0, -_period(spec, "vision layers"))))
    return _checked(spec, range(vision.num_hidden_layers + 1), "vision layer")


def injection_layers(spec: LayerSpec, text: TextConfig) -> tuple[int, ...]:
    """Decoder layers of a spec: `all`, `every:m` = 0, m, 2m, ..., or indices from 0."""
    n = text.num_hidden_layers
    if spec == "all":
        return tuple(range(n))
    if isinstance(spec, str):
        return tuple(range(0, n, _period(spec, "decoder layers")))
    return _checked(spec, range(n), "decoder layer")


def _period(spec: str, what: str) -> int:
    head, _, tail = spec.partition(":")
    if head != "every" or not tail.isdigit() or int(tail) < 1:
        raise ValueError(
            f"{spec!r} does not name {what}: use 'all', 'every:m' with m >= 1, or a list of indices"
        )
    return int(tail)


def _checked(spec: tuple[int, ...], known: range, what: str) -> tuple[int, ...]:
    if not spec:
        raise ValueError(f"an empty list of {what}s: name at least one")
    unknown = sorted(set(spec) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {unknown}: this model has {known.start}..{known[-1]}")
    if len(set(spec)) != len(spec):
        raise ValueError(f"{what}s {spec} repeat")
    return tuple(sorted(spec))


def is_patch(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, P]: slots that hold image patches, not newlines or padding."""
    images = batch["image_segment"].shape[1]
    return (batch["visual_image"] < images) & ~batch["visual_newline"]


def gather_patches(x_BxMNxD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Patches of a row's tiles [B, M*N, D] -> visual slots [B, P, D], through the gather plan."""
    return apply_plan(x_BxMNxD, batch["plan_index"], batch["plan_weight"], batch["plan_inverse"])


def project(x_BxMNxV: jax.Array, batch: dict[str, jax.Array], projector: Projector) -> jax.Array:
    """P(V) on visual slots [B, P, D]; newline and padding slots get no bias and stay zero."""
    gathered = gather_patches(projector.hidden(x_BxMNxV), batch)
    return projector.output(gathered) * is_patch(batch)[..., None]
