"""docs/method.md section 1 once more, in numpy and float64, straight from the formulas.

Loops over rows, images, taps and positions; shares no code with the package.
"""

from __future__ import annotations

import math

import numpy as np

LAST = 5  # V_last of the tests' tower


def float64(tree):
    if isinstance(tree, dict):
        return {name: float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def rms(x):
    return x / math.sqrt(np.mean(x**2) + 1e-6)


def softmax_pool(query, vectors):
    scores = np.array([query @ x / math.sqrt(len(x)) for x in vectors])
    weights = np.exp(scores - scores.max())
    return sum(w * x for w, x in zip(weights / weights.sum(), vectors, strict=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def projected(params, batch, b, slot, of_patch):
    """P at one visual slot: linear_1 and GELU per patch, the plan's mix, linear_2."""
    first, second = (params["multi_modal_projector"][name] for name in ("linear_1", "linear_2"))
    mixed = 0
    for patch, weight in zip(
        batch["plan_index"][b, slot], batch["plan_weight"][b, slot], strict=True
    ):
        mixed = mixed + weight * gelu(of_patch[patch] @ first["kernel"] + first["bias"])
    return mixed @ second["kernel"] + second["bias"]


def patch_slots(batch, b, i):
    return np.flatnonzero((batch["visual_image"][b] == i) & ~batch["visual_newline"][b])


def pictures(batch):
    return [tuple(pair) for pair in np.argwhere(batch["image_segment"] > 0)]


def aligned(config, params, batch, hidden):
    """AMP: Vhat[b, i][k][j] at the j-th patch slot of a picture; hidden[layer] is [B, M*N, V]."""
    taps = [np.mean([hidden[layer] for layer in np.atleast_1d(tap)], 0) for tap in config.taps]
    Vhat = {}
    for b, i in pictures(batch):
        Vhat[b, i] = []
        for k, tap in enumerate(taps):
            Vhat[b, i].append([])
            for slot in patch_slots(batch, b, i):
                at_slot = projected(params, batch, b, slot, tap[b])
                if config.amp:
                    A, B = (params["fusion"]["amp"][name][k] for name in ("lora_A", "lora_B"))
                    mixed = batch["plan_weight"][b, slot] @ tap[b][batch["plan_index"][b, slot]]
                    at_slot = at_slot + (config.alpha or config.rank) / config.rank * mixed @ A @ B
                Vhat[b, i][k].append(at_slot)
    return Vhat


def context(config, batch, b, i):
    """The row positions that c_h of a picture pools."""
    if config.context == "image":
        return batch["visual_position"][b][patch_slots(batch, b, i)]
    newlines = set(batch["visual_position"][b][batch["visual_newline"][b]])
    same = np.flatnonzero(batch["segment_ids"][b] == batch["image_segment"][b, i])
    return [j for j in same if j < batch["context_end"][b, i] and j not in newlines]


def injected(config, params, batch, Vhat, t, h):
    """AGF at injection point t: the new h, and W[b, i, k] of every picture."""
    after, gates = h.copy(), {}
    for b, i in pictures(batch):
        positions = batch["visual_position"][b][patch_slots(batch, b, i)]
        for k, of_tap in enumerate(Vhat[b, i]):
            if config.agf != "gated":
                W = 1 / len(config.taps) if config.agf == "mean" else 1
            else:
                agf, pair = params["fusion"]["agf"], (t, k if config.per_pair else 0)
                c_v = softmax_pool(agf["query_visual"][t], [rms(x) for x in of_tap])
                around = context(config, batch, b, i)
                c_h = softmax_pool(agf["query_hidden"][t], [rms(h[b, j]) for j in around])
                z = np.concatenate([c_v, c_h]) @ agf["gate_kernel"][pair]
                if config.gate == "channel":
                    z = z @ agf["gate_up"][pair]
                W = sigmoid(z + agf["gate_bias"][pair])
                gates[b, i, k] = W = W if config.gate == "channel" else W.item()
            for j, position in enumerate(positions):
                after[b, position] += W * of_tap[j]
    return after, gates
