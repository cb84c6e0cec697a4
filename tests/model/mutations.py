"""What the oracle must see: mistakes that a port of LLaVA can make, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cli_jax.config import ModelConfig
from cli_jax.fusion import base
from cli_jax.fusion.none import NoneConfig
from cli_jax.image.anyres import ImageLayout
from cli_jax.model import decoder, layers, projector, stack, vision, vlm

Params = dict[str, Any]
SIGLIP, CLIP = "siglip_qwen2", "clip_llama"
# Scale of the residual streams (reference.draw_parameters) at which a norm's eps matters.
QUIET = 0.05


def same(x: Any) -> Any:
    return x


class Mutation(NamedTuple):
    """A mistake. It changes the config, the parameters (a copy, in place), the pictures' layouts or
    the code; `scale` is that of the case it is tried on."""

    name: str
    case: str
    config: Callable[[ModelConfig], ModelConfig] = same
    params: Callable[[Params], Any] = same
    layout: Callable[[ImageLayout], ImageLayout] = same
    patch: tuple[Any, str, Any] | None = None
    scale: float = 1.0

    @property
    def id(self) -> str:
        return f"{self.case}: {self.name}"

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with mock.patch.object(*self.patch) if self.patch else contextlib.nullcontext():
            yield


# --- helpers -------------------------------------------------------------------------------------


def vision_config(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, **changes))


def text_config(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda c: dataclasses.replace(c, text=dataclasses.replace(c.text, **changes))


def leaf(params: Params, path: str) -> np.ndarray:
    for part in path.split("/"):
        params = params[part]
    return params


def dropped(path: str) -> Callable[[Params], Any]:
    """A parameter that is added, at zero."""
    return lambda params: leaf(params, path).fill(0)


def swapped(path: str, one: str, other: str) -> Callable[[Params], Any]:
    def swap(params: Params) -> None:
        node = leaf(params, path)
        node[one], node[other] = node[other], node[one]

    return swap


def biases(case: str) -> list[str]:
    """Paths of every bias that a case uses, but for the tower's keys (see INVISIBLE)."""
    norms = [f"vision_tower/encoder/layers/layer_norm{i}" for i in (1, 2)]
    tower = [f"vision_tower/encoder/layers/self_attn/{x}" for x in ("q_proj", "v_proj", "out_proj")]
    tower += [f"vision_tower/encoder/layers/mlp/fc{i}" for i in (1, 2)]
    ends = [f"multi_modal_projector/linear_{i}" for i in (1, 2)]
    if case == SIGLIP:
        ends += [f"language_model/layers/self_attn/{x}_proj" for x in "qkv"]
        ends += ["vision_tower/embeddings/patch_embedding"]
    else:
        ends += ["vision_tower/pre_layrnorm"]
    return [f"{path}/bias" for path in (*norms, *tower, *ends)]


def layer_norm_with(name: str, epsilon: float) -> tuple[Any, str, Any]:
    def layer_norm(eps: float, *args: Any, name: str) -> nn.Module:
        return layers.layer_norm(epsilon if name == wrong else eps, *args, name=name)

    wrong = name
    return vision, "layer_norm", layer_norm


def rms_norm_with(name: str | None, epsilon: float) -> tuple[Any, str, Any]:
    def rms_norm(eps: float, *args: Any, name: str | None = None) -> nn.Module:
        return layers.RMSNorm(epsilon if name == wrong else eps, *args, name=name)

    wrong = name
    return decoder, "RMSNorm", rms_norm


# --- any-resolution layout -----------------------------------------------------------------------


def _retile(plan: ImageLayout, number: Callable[[np.ndarray], np.ndarray]) -> ImageLayout:
    patches = 16  # of a tile of the oracle's models
    tile, patch = np.divmod(plan.plan_index, patches)
    index = (number(tile) * patches + patch).astype(np.int32)
    return dataclasses.replace(plan, plan_index=index)


def tiles_column_by_column(plan: ImageLayout) -> ImageLayout:
    rows, columns = plan.grid
    if not rows:
        return plan
    order = np.arange(rows * columns).reshape(columns, rows).T.ravel()
    return _retile(plan, lambda tile: np.where(tile > 0, order[np.maximum(tile - 1, 0)] + 1, 0))


def base_view_last(plan: ImageLayout) -> ImageLayout:
    return _retile(plan, lambda tile: (tile - 1) % plan.num_tiles)


def newline_before_each_row(plan: ImageLayout) -> ImageLayout:
    rows, columns = plan.out
    if not rows:
        order = np.roll(np.arange(plan.num_tokens), 1)
    else:
        grid = np.arange(plan.num_tokens - rows * (columns + 1), plan.num_tokens)
        rolled = np.roll(grid.reshape(rows, columns + 1), 1, axis=1).ravel()
        order = np.concatenate([np.arange(grid[0]), rolled])
    return dataclasses.replace(
        plan,
        plan_index=plan.plan_index[order],
        plan_weight=plan.plan_weight[order],
        newline=plan.newline[order],
    )


def nearest_patch(plan: ImageLayout) -> ImageLayout:
    best = plan.plan_weight.argmax(-1)[:, None] == np.arange(plan.plan_weight.shape[-1])
    return dataclasses.replace(plan, plan_weight=(best & (plan.plan_weight > 0)).astype(np.float32))


def project_after_interpolating(x, batch, projector):
    gathered = base.gather_patches(x, batch)
    return projector(gathered) * base.is_patch(batch)[..., None]


# --- vision tower --------------------------------------------------------------------------------


def one_layer_more(params: Params) -> None:
    """Appends a layer to the tower, made of the others' weights."""
    tower = leaf(params, "vision_tower/encoder")
    tower["layers"] = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), tower["layers"])


def one_layer_too_far(c: ModelConfig) -> ModelConfig:
    return vision_config(num_hidden_layers=c.vision.num_hidden_layers + 1)(c)


def one_layer_too_early(c: ModelConfig) -> ModelConfig:
    return dataclasses.replace(c, fusion=NoneConfig(vision_layer=c.vision.last_layer - 1))


_look = vlm.VLM.look


def post_normed(self, *args: Any):
    _, states = _look(self, *args)
    norm = self.variables["params"]["vision_tower"]["post_layernorm"]
    mean, variance = states.mean(-1, keepdims=True), states.var(-1, keepdims=True)
    states = (states - mean) * jax.lax.rsqrt(variance + self.config.vision.layer_norm_eps)
    return None, states * norm["scale"] + norm["bias"]


def no_pre_norm(*args: Any, name: str) -> Any:
    return same if name == "pre_layrnorm" else layers.layer_norm(*args, name=name)


_run = stack.run


def keep_cls_drop_last(*args: Any, **kwargs: Any) -> Any:
    carry, outs = _run(*args, **kwargs)
    if isinstance(carry, jax.Array):  # the tower's; its first token is dropped next
        carry = jnp.roll(carry, 1, axis=1)
    return carry, outs


# --- decoder -------------------------------------------------------------------------------------


def interleaved(x, rotary):
    """Rotates neighbors (0, 1), (2, 3), ... instead of the two halves."""
    cos, sin = (jnp.repeat(y[..., : y.shape[-1] // 2], 2, axis=-1) for y in rotary)
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def offset_weights(params: Params) -> None:
    """RMSNorm with weight 1 + w, as Gemma's."""
    for name in ("layers/input_layernorm", "layers/post_attention_layernorm", "norm"):
        leaf(params, f"language_model/{name}/scale")[...] += 1


_attention = decoder.attention


def across_segments(q, k, v, segment_ids, **kwargs: Any):
    return _attention(q, k, v, None, **kwargs)


def not_causal(q, k, v, segment_ids, **kwargs: Any):
    return _attention(q, k, v, segment_ids, **{**kwargs, "causal": False})


def tiled_key_heads(q, k, v, segment_ids, **kwargs: Any):
    """Query head h reads key head h mod G, where it should be h // (H / G)."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.tile(x, (1, 1, repeats, 1)) for x in (k, v))
    return _attention(q, k, v, segment_ids, **kwargs)


def unscaled_by_width(q, k, v, segment_ids, **kwargs: Any):
    """Scores scaled by the width of all heads together."""
    return _attention(q * q.shape[2] ** -0.5, k, v, segment_ids, **kwargs)


# --- the list ------------------------------------------------------------------------------------


def _both(case: str) -> Iterator[Mutation]:
    """Mistakes that either family can make."""
    siglip = case == SIGLIP
    right, wrong = (1e-6, 1e-5) if siglip else (1e-5, 1e-6)
    kinds = {"gelu_tanh": "tanh", "gelu": "erf", "quick_gelu": "quick"}
    used = "gelu_tanh" if siglip else "quick_gelu"
    for kind in (k for k in kinds if k != used):
        yield Mutation(
            f"tower GELU {kinds[used]} -> {kinds[kind]}", case, vision_config(hidden_act=kind)
        )
    for kind in ("gelu_tanh", "quick_gelu"):
        yield Mutation(
            f"projector GELU erf -> {kinds[kind]}",
            case,
            patch=(projector, "gelu_erf", layers.ACTIVATIONS[kind]),
        )
    for name in ("layer_norm1", "layer_norm2", *(() if siglip else ("pre_layrnorm",))):
        yield Mutation(
            f"{name} eps {right:g} -> {wrong:g}",
            case,
            patch=layer_norm_with(name, wrong),
            scale=QUIET,
        )
    for norm in ("input_layernorm", "post_attention_layernorm", None):
        yield Mutation(
            f"{norm or 'final norm'} eps {right:g} -> {wrong:g}",
            case,
            patch=rms_norm_with(norm, wrong),
            scale=QUIET,
        )
    for path in biases(case):
        yield Mutation(
            f"no {path.removesuffix('/bias').replace('/layers', '')} bias",
            case,
            params=dropped(path),
        )
    tower, blocks = "vision_tower/encoder/layers", "language_model/layers"
    yield Mutation(
        "layer_norm1 <-> layer_norm2", case, params=swapped(tower, "layer_norm1", "layer_norm2")
    )
    yield Mutation(
        "input_layernorm <-> post_attention_layernorm",
        case,
        params=swapped(blocks, "input_layernorm", "post_attention_layernorm"),
    )
    yield Mutation(
        "gate_proj <-> up_proj", case, params=swapped(f"{blocks}/mlp", "gate_proj", "up_proj")
    )
    theta, other = (1e6, 1e4) if siglip else (1e4, 1e6)
    yield Mutation(f"rope theta {theta:g} -> {other:g}", case, text_config(rope_theta=other))
    yield Mutation("interleaved rope", case, patch=(decoder, "rotate", interleaved))
    yield Mutation("RMSNorm weight 1 + w", case, params=offset_weights)
    yield Mutation(
        "no position embedding",
        case,
        params=dropped("vision_tower/embeddings/position_embedding/embedding"),
    )
    which = ("27th", "26th") if siglip else ("24th", "23rd")
    yield Mutation(
        f"the {which[0]} layer, not the {which[1]}", case, one_layer_too_far, one_layer_more
    )
    yield Mutation("one vision layer too early", case, one_layer_too_early)
    yield Mutation("post_layernorm applied", case, patch=(vlm.VLM, "look", post_normed))
    yield Mutation(
        "packed samples see each other", case, patch=(decoder, "attention", across_segments)
    )
    yield Mutation("not causal", case, patch=(decoder, "attention", not_causal))
    yield Mutation(
        "scores scaled by the whole width", case, patch=(decoder, "attention", unscaled_by_width)
    )


def _list() -> Iterator[Mutation]:
    yield from _both(SIGLIP)
    yield Mutation("tiles column by column", SIGLIP, layout=tiles_column_by_column)
    yield Mutation("base view last", SIGLIP, layout=base_view_last)
    yield Mutation("newline before each row", SIGLIP, layout=newline_before_each_row)
    yield Mutation("no newline", SIGLIP, params=dropped("image_newline"))
    yield Mutation("nearest patch, not bilinear", SIGLIP, layout=nearest_patch)
    yield Mutation(
        "interpolation before the projector",
        SIGLIP,
        patch=(base, "project", project_after_interpolating),
    )
    yield Mutation(
        "query heads on the wrong key heads", SIGLIP, patch=(decoder, "attention", tiled_key_heads)
    )
    yield from _both(CLIP)
    yield Mutation("no pre_layrnorm", CLIP, patch=(vision, "layer_norm", no_pre_norm))
    yield Mutation("CLS kept, last patch dropped", CLIP, patch=(stack, "run", keep_cls_drop_last))
    yield Mutation(
        "no class embedding", CLIP, params=dropped("vision_tower/embeddings/class_embedding")
    )


MUTATIONS = tuple(_list())

# A key's bias adds the same number to all scores of a query, and softmax does not see it. (The
# decoder's rotation depends on the key's place, so there it does.) test_attention_inputs.py looks
# at the keys themselves.
INVISIBLE = tuple(
    Mutation(
        "no vision_tower k_proj bias",
        case,
        params=dropped("vision_tower/encoder/layers/self_attn/k_proj/bias"),
    )
    for case in (SIGLIP, CLIP)
)
