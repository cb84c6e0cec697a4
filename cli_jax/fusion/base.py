"""The interface of a fusion strategy.

A strategy declares which vision layers it taps, where it injects, its parameters (with logical
axes), what it puts at the decoder's input and what it adds inside. The decoder and the vision tower
know nothing of strategies: they are given layer indices and an `Injection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from cli_jax.config import ModelConfig, TextConfig, VisionConfig
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.model.decoder import Injection
from cli_jax.model.gather import apply_plan
from cli_jax.model.layers import Dtype
from cli_jax.model.projector import Projector
from cli_jax.model.remat import rematerialize
from cli_jax.model.vision import Emit

LayerSpec = tuple[int, ...] | str  # indices, "all", "every:m"; of the tower also "at:30%,90%"
TapSpec = tuple[int | tuple[int, ...], ...] | str  # an entry with several layers is their mean
Tap = tuple[int, ...]  # vision layers whose mean is one tap


class Look(Protocol):
    """Runs the tower to layer `stop` once and keeps, of each of the ascending `layers`,
    emit(V_k [B, M*N, V], xs[i]), stacked on axis 0 or, with `add`, summed up; returns that and
    V_stop [B, M*N, V]. What is emitted stays for the whole decoder: better the features of visual
    slots, or a sum, than the states of all patches."""

    def __call__(
        self, layers: tuple[int, ...], stop: int, emit: Emit, xs: Any, add: bool = False, /
    ) -> tuple[Any, jax.Array]: ...


class Row(NamedTuple):
    """How much one row holds: tokens L, visual slots P, tiles M, images I, text slots Q."""

    length: int
    visual: int
    tiles: int
    images: int = 1
    text: int = 0


class Copy(NamedTuple):
    """What a new parameter starts as: another one, or a layer of a stacked one.

    Leading axes that the other does not have are filled with copies. What a run starts from has the
    last word: the other is copied as loaded, and a parameter that was loaded itself stays.
    """

    path: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}, layer {self.layer}"


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
    def gated_taps(cls, config: Any, vision: VisionConfig) -> tuple[Tap, ...]:
        """The taps that the K axis of the model's gates stands for; empty without gates."""
        return ()

    @classmethod
    def banked_taps(cls, config: Any, vision: VisionConfig) -> tuple[Tap, ...]:
        """The taps kept for the whole decoder, [K, B, P, D]: the bank."""
        return ()

    @classmethod
    def bank_reads(cls, config: Any, model: ModelConfig, row: Row) -> float:
        """Numbers that all injections of one row's forward pass read of what is kept for them."""
        points = len(cls.decoder_layers(config, model.text))
        taps = len(cls.banked_taps(config, model.vision))
        return float(points * taps * row.visual * model.text.hidden_size)

    @classmethod
    def extras(cls, config: Any, model: ModelConfig) -> Extras:
        """Tokens and tiles that host code adds to every picture; ValueError if it cannot."""
        return NO_EXTRAS

    @classmethod
    def flops(cls, config: Any, model: ModelConfig, row: Row) -> dict[str, float]:
        """Forward FLOPs of one row by part (`fusion`, `projector`, ...; dryrun/flops.py)."""
        raise TypeError(f"{cls.__name__} must count its FLOPs")

    @classmethod
    def has_plain_projector(cls, config: Any) -> bool:
        """Whether the model's projector is LLaVA's own, which reads one layer.

        False: nothing calls P, or it reads several layers; then a checkpoint's does not fit.
        """
        return True

    @classmethod
    def copies(cls, config: Any, paths: Iterable[str]) -> dict[str, Copy]:
        """Those of the model's `paths` that start as copies."""
        return {}

    @classmethod
    def needs_prompt_context(cls, config: Any) -> bool:
        """Whether image positions see the question: its labels must then be ignored."""
        return False

    def look_at_taps(
        self, look: Look, taps: tuple[Tap, ...], emit: Emit, xs: Any
    ) -> tuple[Any, jax.Array]:
        """What `emit` makes of every tap and its entry of `xs`, stacked; and V_last [B, M*N, V].

        A tap of one layer is emitted where it arises. Means of layers, and layers behind V_last,
        have to wait until the tower is done: then the states of all layers are kept.
        """
        last = self.model.vision.last_layer
        if all(len(tap) == 1 and tap[0] <= last for tap in taps):
            return look(layers_of(taps), last, emit, xs)
        layers = layers_of((*taps, (last,)))
        hidden_ExBxMNxV, _ = look(layers, layers[-1], raw, None)
        mean_KxBxMNxV = take_taps(hidden_ExBxMNxV, layers, taps)
        outs = self.each(lambda tap: emit(*tap), (mean_KxBxMNxV, xs))
        return outs, hidden_ExBxMNxV[layers.index(last)]

    def each(self, f: Callable[[Any], Any], xs: Any) -> Any:
        """f of every entry on the leading axis of `xs`, one after another, stacked."""
        f = rematerialize(f, self.remat, looped=not self.unroll)
        unroll = True if self.unroll else 1
        return jax.lax.scan(lambda _, x: (None, f(x)), None, xs, unroll=unroll)[1]


def taps(spec: TapSpec, vision: VisionConfig) -> tuple[Tap, ...]:
    """The taps of a spec: `all` = 1..V_last, `every:m` counts back from V_last.

    `at:30%,60%,90%` are the layers nearest to these shares of V_last, each of them once.
    """
    last = vision.last_layer
    if spec == "all":
        return tuple((k,) for k in range(1, last + 1))
    if isinstance(spec, str) and spec.startswith("at:"):
        nearest = {max(1, int(last * share / 100 + 0.5)) for share in shares(spec)}
        return tuple((k,) for k in sorted(nearest))
    if isinstance(spec, str):
        return tuple((k,) for k in sorted(range(last, 0, -_period(spec, "vision layers"))))
    known = range(vision.num_hidden_layers + 1)
    each = [(tap,) if isinstance(tap, int) else tap for tap in spec]
    return tuple(sorted(_distinct([_checked(tap, known, "vision layer") for tap in each], "tap")))


def layers_of(taps: Sequence[Tap]) -> tuple[int, ...]:
    """Ascending vision layers that some taps are made of."""
    return tuple(sorted({layer for tap in taps for layer in tap}))


def take_taps(
    hidden_ExBxMNxV: jax.Array, emitted: tuple[int, ...], taps: tuple[Tap, ...]
) -> jax.Array:
    """Taps [K, B, M*N, V] out of the hidden states of the `emitted` layers."""
    if taps == tuple((layer,) for layer in emitted):
        return hidden_ExBxMNxV  # no copy
    rows = [[hidden_ExBxMNxV[emitted.index(layer)] for layer in tap] for tap in taps]
    return jnp.stack([jnp.mean(jnp.stack(row), axis=0) if row[1:] else row[0] for row in rows])


def injection_layers(spec: LayerSpec, text: TextConfig) -> tuple[int, ...]:
    """Decoder layers of a spec: `all`, `every:m` = 0, m, 2m, ..., or indices from 0."""
    n = text.num_hidden_layers
    if spec == "all":
        return tuple(range(n))
    if isinstance(spec, str):
        return tuple(range(0, n, _period(spec, "decoder layers")))
    return _checked(spec, range(n), "decoder layer")


def shares(spec: str) -> tuple[int, ...]:
    """The per cents of `at:30%,60%,90%`: ascending, from 1 to 100."""
    parts = spec.removeprefix("at:").split(",")
    found = tuple(int(p[:-1]) for p in parts if p.endswith("%") and p[:-1].isdigit())
    if len(found) != len(parts) or list(found) != sorted(set(found) & set(range(1, 101))):
        raise ValueError(f"{spec!r} does not name vision layers: use ascending shares 'at:30%,90%'")
    return found


def _period(spec: str, what: str) -> int:
    head, _, tail = spec.partition(":")
    if head != "every" or not tail.isdigit() or int(tail) < 1:
        raise ValueError(
            f"{spec!r} does not name {what}: use 'all', 'every:m' with m >= 1, or a list of indices"
        )
    return int(tail)


def _checked(layers: tuple[int, ...], known: range, what: str) -> tuple[int, ...]:
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {unknown}: this model has {known.start}..{known[-1]}")
    return tuple(sorted(_distinct(layers, what)))


def _distinct(items: Sequence[Any], what: str) -> tuple[Any, ...]:
    if not items:
        raise ValueError(f"an empty list of {what}s: name at least one")
    if len(set(items)) != len(items):
        raise ValueError(f"{what}s {tuple(items)} repeat")
    return tuple(items)


def raw(V_BxMNxV: jax.Array, _: Any) -> jax.Array:
    """Emits the hidden state itself."""
    return V_BxMNxV


def is_patch(batch: dict[str, jax.Array]) -> jax.Array:
    """bool [B, P]: slots that hold image patches, not newlines or padding."""
    images = batch["image_segment"].shape[1]
    return (batch["visual_image"] < images) & ~batch["visual_newline"]


def gather_patches(x_BxMNxD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Patches of a row's tiles [B, M*N, D] -> visual slots [B, P, D], through the gather plan."""
    check_plan(x_BxMNxD, batch)
    return apply_plan(x_BxMNxD, batch["plan_index"], batch["plan_weight"], batch["plan_inverse"])


def check_plan(x_BxMNxD: jax.Array, batch: dict[str, jax.Array]) -> None:
    """Raises ValueError if the batch's plan is not about as many features as the strategy has."""
    there, here = batch["plan_inverse"].shape[1], x_BxMNxD.shape[1]
    if there != here:
        raise ValueError(
            f"the batch's plan reads {there} features of a row, the model has {here}: make the "
            "batch with the strategy's extras (Experiment.extras)"
        )


def project(x_BxMNxV: jax.Array, batch: dict[str, jax.Array], projector: Projector) -> jax.Array:
    """P(V) on visual slots [B, P, D]; newline and padding slots get no bias and stay zero."""
    return project_hidden(projector.hidden(x_BxMNxV), batch, projector)


def project_hidden(
    hidden_BxMNxD: jax.Array, batch: dict[str, jax.Array], projector: Projector
) -> jax.Array:
    """The second half of `project`, from P's hidden units of every patch."""
    return projector.output(gather_patches(hidden_BxMNxD, batch)) * is_patch(batch)[..., None]


def project_flops(
    model: ModelConfig, row: Row, *, width: int | None = None, pooled: int = 0
) -> float:
    """FLOPs of one `project`: the first map on every patch, the second on every visual slot.

    width: of what is projected, by default V; pooled: features of a tile beside its patches.
    """
    V, D = width or model.vision.hidden_size, model.text.hidden_size
    W, features = model.projector_hidden, row.tiles * (model.vision.num_patches + pooled)
    return 2.0 * W * (features * V + row.visual * D) + plan_flops(W, row.visual)


def plan_flops(width: int, slots: int) -> float:
    """FLOPs of one `apply_plan` of features of a width: four weighted patches a slot."""
    return 8.0 * width * slots
