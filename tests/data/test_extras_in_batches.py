"""From rows of JSON to batches with what strategies add to pictures: whole, once, in its place."""

import dataclasses

import numpy as np
import pytest
import small

from cli_jax.data import SampleSpec, Sizes, TooLong, collate, make_sample
from cli_jax.data.bins import load
from cli_jax.data.collate import Extent
from cli_jax.data.offline import make_bins
from cli_jax.data.pipeline import make_loader, report
from cli_jax.data.sample import measure
from cli_jax.experiment import ConfigError
from cli_jax.generate.buckets import batches
from cli_jax.image.anyres import layout
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.image.preprocess import make_tiles, open_image

TOKENIZER = small.tokenizer()
N = small.VISION.num_patches
PAD = dataclasses.replace(small.IMAGE, aspect_ratio="pad", multi_image="same")
CASES = pytest.mark.parametrize(
    ("image", "extras"),
    [
        (small.IMAGE, Extras(pooled=2)),
        (small.IMAGE, Extras(stacks=4)),
        (PAD, Extras(pooled=2)),
        (PAD, Extras(stacks=3, tiles=3)),
    ],
    ids=["anyres_pooled", "anyres_stacks", "pad_pooled", "pad_stacks"],
)


def spec_of(image, extras, room=None):
    spec = SampleSpec.from_config(small.DATA, image, small.VISION, TOKENIZER, extras)
    return dataclasses.replace(spec, room=room or Extent(1000, 500, 100, 9, 1000))


@CASES
def test_every_picture_brings_its_own(tmp_path, image, extras):
    """A batch's plans, on patches that are known by their pixels, read what each layout says."""
    rows = small.mixed_rows(tmp_path, 9)
    spec = spec_of(image, extras)
    samples = [make_sample(row, str(tmp_path), spec) for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert measure(row, str(tmp_path), spec) == sample.extent
    packed = [samples[:4], samples[4:]]
    used = np.max([np.sum([s.extent for s in row], axis=0) for row in packed], axis=0)
    row = (int(n) + 2 for n in used[:4])
    sizes = Sizes(2, *row, 8, N, pooled=extras.pooled, stacks=extras.stacks)
    batch = collate(packed, sizes)
    features = known_features(batch["pixel_values"], extras.pooled)
    pictures = 0
    for b, kept in enumerate((rows[:4], rows[4:])):
        i = 0
        for row in kept:
            names = row.get("image", [])
            names = [names] if isinstance(names, str) else names
            for name in names:
                how = {"single": len(names) == 1, "extras": extras}
                picture = open_image(str(tmp_path), name, 10**6)
                plan = layout(*picture.size, image, small.VISION, **how)
                own = known_features(
                    make_tiles(picture, image, small.VISION, **how)[None], extras.pooled
                )[0]
                slots = batch["visual_image"][b] == i
                found = read(batch["plan_index"][b, slots], batch["plan_weight"][b, slots])
                np.testing.assert_array_equal(
                    found(features[b]), read(plan.plan_index, plan.plan_weight)(own)
                )
                found = read(batch["stack_index"][b, :, i], batch["stack_weight"][b, :, i])
                np.testing.assert_array_equal(
                    found(features[b]), read(plan.stack_index, plan.stack_weight)(own)
                )
                pictures, i = pictures + 1, i + 1
        assert not batch["stack_weight"][b, :, i:].any()
    assert pictures == 9
    check_inverse(batch, "plan")
    check_inverse(batch, "stack")


def known_features(pixels, pooled):
    """Numbers [rows, M * (N + E)] by which a tile's patches and its pooled features are known."""
    rows, tiles = pixels.shape[:2]
    each = pixels.astype(np.int64).reshape(rows, tiles, 2, 4, 2, 4, 3).sum((3, 5, 6))
    each = each.reshape(rows, tiles, N)
    more = [each.sum(-1) * 10**4 * (e + 1) for e in range(pooled)]
    return np.concatenate([each, *(x[..., None] for x in more)], -1).reshape(rows, -1)


def read(index, weight):
    return lambda features: (features[index] * weight).sum(-1)


def check_inverse(batch, name):
    for index, weight, inverse in zip(
        *(batch[f"{name}_{field}"] for field in ("index", "weight", "inverse")), strict=True
    ):
        entries = inverse[inverse < index.size]
        np.testing.assert_array_equal(np.sort(entries), np.flatnonzero(weight))
        patch, _ = np.nonzero(inverse < index.size)
        np.testing.assert_array_equal(index.ravel()[entries], patch)


def test_rows_have_room_for_the_extra_tiles():
    sizes = Sizes.from_config(small.DATA, small.VISION, 1, Extras(stacks=3, tiles=3))
    assert sizes.tiles == small.DATA.tiles_per_row + 3 * small.DATA.images_per_row
    assert sizes.row[:2] == (small.DATA.row_length, small.DATA.visual_per_row)


def test_rows_too_short_for_any_picture_are_refused():
    data = dataclasses.replace(small.DATA, visual_per_row=5)
    assert Sizes.from_config(data, small.VISION, 1).visual == 5
    with pytest.raises(
        ConfigError, match=r"visual_per_row=5 holds no picture: .* 2 tokens .* 6 or"
    ):
        Sizes.from_config(data, small.VISION, 1, Extras(pooled=2))


def test_what_is_too_long_with_them_is_dropped(tmp_path):
    row = small.row(0, image=small.picture(tmp_path, "a.png", 8, 8))
    tokens = make_sample(row, str(tmp_path), spec_of(PAD, NO_EXTRAS)).extent.tokens
    room = Extent(tokens, 500, 100, 9, tokens)
    make_sample(row, str(tmp_path), spec_of(PAD, NO_EXTRAS, room))
    for make in (make_sample, measure):
        with pytest.raises(TooLong, match=f"{tokens + 2} tokens do not fit a row of {tokens}"):
            make(row, str(tmp_path), spec_of(PAD, Extras(pooled=2), room))
        few = room._replace(tokens=1000, tiles=1)
        with pytest.raises(TooLong, match="tiles do not fit a row of 1"):
            make(row, str(tmp_path), spec_of(PAD, Extras(stacks=2, tiles=2), few))


def loader(data, image, extras, **changes):
    return make_loader(
        dataclasses.replace(data, **changes),
        image,
        small.VISION,
        seed=0,
        rows_per_process=2,
        tokenizer=TOKENIZER,
        extras=extras,
    )


@CASES
def test_the_loader_packs_them(tmp_path, image, extras):
    data = small.config(small.write(tmp_path, small.mixed_rows(tmp_path, 12)))
    stream = loader(data, image, extras)
    batch = next(stream)
    M = data.tiles_per_row + data.images_per_row * extras.tiles
    assert batch["pixel_values"].shape[1] == M
    assert batch["plan_inverse"].shape == (2, M * (N + extras.pooled), 4)
    assert batch["stack_index"].shape == (2, extras.stacks, data.images_per_row, N, 4)
    assert batch["stack_inverse"].shape[2] == 4 * extras.stacks
    assert (batch["stack_weight"] > 0).any() == bool(extras.stacks)
    check_inverse(batch, "plan")
    check_inverse(batch, "stack")
    assert 0 < report(stream.get_state())["fill_tiles"] <= 1
    stream.close()


def test_processes_hand_them_over(tmp_path):
    data = small.config(small.write(tmp_path, small.mixed_rows(tmp_path, 12)))
    streams = [loader(data, PAD, Extras(stacks=3, tiles=3), workers=n) for n in (0, 1)]
    here, there = map(next, streams)
    for name, value in here.items():
        np.testing.assert_array_equal(there[name], value)
    for stream in streams:
        stream.close()


def test_a_stream_is_not_continued_with_other_extras(tmp_path):
    data = small.config(small.write(tmp_path, small.mixed_rows(tmp_path, 12)))
    plain, pooled = (loader(data, PAD, extras) for extras in (NO_EXTRAS, Extras(pooled=2)))
    with pytest.raises(ConfigError, match=r"pooled that config\.fusion adds was None and is 2"):
        pooled.set_state(plain.get_state())
    for stream in (plain, pooled):
        stream.close()


def test_bins_belong_to_their_extras(tmp_path):
    data = small.config(small.write(tmp_path, small.mixed_rows(tmp_path, 12)))
    made = {}
    for name, extras in {"plain": NO_EXTRAS, "pooled": Extras(pooled=2)}.items():
        path = tmp_path / f"{name}.npz"
        make_bins(data, PAD, small.VISION, TOKENIZER, path, seed=0, extras=extras, progress=False)
        made[name] = dataclasses.replace(data, bins=str(path))
        assert not any("fusion" in key for key in load(path).settings) or name == "pooled"
        stream = loader(made[name], PAD, extras)
        check_inverse(next(stream), "plan")
        stream.close()
    for name, extras in (("plain", Extras(pooled=2)), ("pooled", NO_EXTRAS)):
        with pytest.raises(ConfigError, match=r"pooled that config\.fusion adds was"):
            loader(made[name], PAD, extras)


@CASES
def test_prompts_are_batched_with_them(tmp_path, image, extras):
    rows = small.mixed_rows(tmp_path, 6)
    spec = spec_of(image, extras)
    prompts = [(i, make_sample(row, str(tmp_path), spec)) for i, row in enumerate(rows)]
    numbers = []
    for group in batches(iter(prompts), 2, small.VISION, extras):
        numbers += group.numbers
        check_inverse(group.batch, "plan")
        check_inverse(group.batch, "stack")
        for row, number in enumerate(group.numbers):
            used = (group.batch["stack_weight"][row] > 0).sum()
            assert used == (prompts[number][1].stack_weight > 0).sum()
    assert sorted(numbers) == list(range(6))


@pytest.mark.parametrize(
    ("changes", "extras", "message"),
    [
        ({"tiles_per_row": -1}, Extras(), r"data\.tiles_per_row is negative"),
        (
            {"images_per_row": 0},
            Extras(stacks=4),
            r"data\.images_per_row=0: the fusion strategy needs",
        ),
    ],
)
def test_sizes_that_hold_nothing_are_refused(changes, extras, message):
    data = dataclasses.replace(small.DATA, **changes)
    with pytest.raises(ConfigError, match=message):
        Sizes.from_config(data, small.VISION, 1, extras)
