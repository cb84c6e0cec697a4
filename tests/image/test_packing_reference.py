"""The plan reproduces the references' packing of features, on thousands of sizes.

`hf`: transformers' own pack_image_features. `original`: LLaVA-NeXT's packing restated in torch.
Features are random float64, so every patch, weight and newline has to be in its place.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from cli_jax.image import anyres

torch = pytest.importorskip("torch")

PER_MODE = 2000
LIMIT = 1e-6  # float32 weights against float64 ones, features of order 1
A4 = ((768, 384), (384, 768), (768, 768), (384, 1152), (1152, 384))  # (height, width)
LOPSIDED = ((384, 1152), (768, 384), (1536, 768), (384, 384), (768, 1920))

EXTREMES = [
    (2304, 2304),  # 37 tiles
    (4000, 3000),
    (3000, 4000),
    (1150, 1378),  # 8,765 tokens, the most with the standard pinpoints
    (1200, 800),  # just below the down-interpolation
    (1872, 832),  # the two roundings differ here
    (369, 820),
    (384, 384),  # 1x1 grid
    (10, 10),
    (1, 700),
    (700, 1),
    (2000, 20),
]


@pytest.fixture(scope="module")
def features():
    """[37 tiles, 729 patches, 2 channels] and a newline [2]."""
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny kernels: threads only cost
    yield rng.normal(size=(37, 729, 2)), rng.normal(size=2)
    torch.set_num_threads(threads)


def sizes(count, seed):
    """(width, height) pairs, half of them log-uniform (elongated), half of photographs' kind."""
    rng = np.random.default_rng(seed)
    log = np.exp(rng.uniform(np.log(8), np.log(4000), (count - count // 2, 2)))
    photo = rng.uniform(200, 3000, count // 2)[:, None] * [1, 1]
    photo[:, 1] *= rng.uniform(0.4, 2.5, count // 2)
    return [(int(w), int(h)) for w, h in np.concatenate([log, photo])]


def by_plan(plan, features, newline):
    """What the device does: a gather, a weighted sum, the newline."""
    flat = features[: plan.num_tiles].reshape(-1, features.shape[-1])
    out = np.einsum("pcd,pc->pd", flat[plan.plan_index], plan.plan_weight)
    return np.where(plan.newline[:, None], newline, out)


def by_original(features, newline, size, pinpoints, max_tiles):
    """LLaVA-NeXT: sizes and pinpoints are (width, height); `features` holds all 37 tiles."""
    width, height = size
    best, most, least = None, 0, float("inf")
    for W, H in [(w, h) for h, w in pinpoints]:
        scale = min(W / width, H / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        if kept > most or (kept == most and W * H - kept < least):
            best, most, least = (W, H), kept, W * H - kept
    columns, rows = best[0] // 384, best[1] // 384
    base, tiles = features[0], features[1 : 1 + rows * columns]
    x = tiles.view(rows, columns, 27, 27, -1).permute(4, 0, 2, 1, 3).contiguous()
    x = x.flatten(1, 2).flatten(2, 3)  # [D, rows, columns]
    H, W = x.shape[1:]
    if width / height > W / H:
        cut = (H - int(height * (W / width))) // 2
        x = x[:, cut : H - cut, :]
    else:
        cut = (W - int(width * (H / height))) // 2
        x = x[:, :, cut : W - cut]
    _, H, W = x.shape
    if max_tiles is not None:
        times = math.sqrt(H * W / (max_tiles * 27**2))
        if times > 1.1:
            shape = [int(H // times), int(W // times)]
            x = torch.nn.functional.interpolate(x[None], shape, mode="bilinear")[0]
    x = torch.cat([x, newline[:, None, None].expand(*x.shape[:-1], 1)], -1)
    return torch.cat([base, x.flatten(1, 2).T])


def by_hugging_face(features, newline, size, pinpoints, max_tiles):
    """transformers: sizes and pinpoints are (height, width)."""
    modeling = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")
    width, height = size
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=384, patch_size=14),
        image_grid_pinpoints=[list(pair) for pair in pinpoints],
    )
    count = modeling.image_size_to_num_patches((height, width), config.image_grid_pinpoints, 384)
    # It knows no `anyres` without a maximum; a maximum out of reach is the same.
    packed, _ = modeling.LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [features[:count]],
        [(height, width)],
        image_newline=newline,
        vision_aspect_ratio=f"anyres_max_{max_tiles or 10**6}",
    )
    return packed[0]


REFERENCES = {"hf": by_hugging_face, "original": by_original}


def compare(image, vision, rounding, picture_sizes, max_tiles, features):
    """The plan against the reference on every size; returns the layouts."""
    image = dataclasses.replace(image, rounding=rounding)
    torch_features = [torch.from_numpy(f) for f in features]
    plans = []
    for size in picture_sizes:
        plan = anyres.layout(*size, image, vision, single=True)
        ours = by_plan(plan, *features)
        theirs = REFERENCES[rounding](*torch_features, size, image.grid_pinpoints, max_tiles)
        assert ours.shape == theirs.shape, f"{size}: {ours.shape} against {tuple(theirs.shape)}"
        error = np.abs(ours - theirs.numpy()).max()
        assert error <= LIMIT, f"{size}: {error}"
        plans.append(plan)
    return plans


@pytest.mark.parametrize("rounding", REFERENCES)
def test_random_sizes_and_extremes(ov, rounding, features):
    image, vision = ov
    some = EXTREMES + sizes(PER_MODE, seed=1)
    plans = compare(image, vision, rounding, some, 9, features)
    # The sample is worth something: it has the cases that matter, many times over.
    shrunk = sum(p.out != p.unpadded for p in plans)
    assert len(plans) >= 2000
    assert shrunk > 200
    assert sum(p.num_tiles == 37 for p in plans) > 10
    assert len({p.grid for p in plans}) == 36
    assert max(p.num_tokens for p in plans) == 8765


@pytest.mark.parametrize("rounding", REFERENCES)
def test_the_largest_layout_of_all(ov, rounding, features):
    image, vision = ov
    image = dataclasses.replace(image, grid_pinpoints=((2304, 1152),))
    (plan,) = compare(image, vision, rounding, [(490, 1620)], 9, features)
    assert plan.num_tokens == 8829


@pytest.mark.parametrize("rounding", REFERENCES)
@pytest.mark.parametrize(
    ("name", "max_tiles", "pinpoints"),
    [("anyres", None, A4), ("anyres_max_2", 2, LOPSIDED), ("anyres", None, LOPSIDED)],
)
def test_other_pinpoints_and_maxima(ov, rounding, features, name, max_tiles, pinpoints):
    image, vision = ov
    image = dataclasses.replace(image, aspect_ratio=name, grid_pinpoints=pinpoints)
    some = [s for s in EXTREMES if s != (1, 700)] + sizes(150, seed=2)
    plans = compare(image, vision, rounding, some, max_tiles, features)
    assert len({p.grid for p in plans}) >= 4
    assert any(p.out != p.unpadded for p in plans) == (max_tiles is not None)


def test_several_pictures(ov, features):
    """Each is one tile and one newline, 730 tokens, as transformers packs it."""
    modeling = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")
    tiles, newline = features
    packed, _ = modeling.LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(), [torch.from_numpy(tiles[:1])], [(5, 5)], torch.from_numpy(newline)
    )
    plan = anyres.layout(640, 480, *ov, single=False)
    np.testing.assert_array_equal(by_plan(plan, tiles, newline), packed[0].numpy())
