"""Packing and collating: every sample arrives intact, once, and touches no other."""

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_jax.batch import IGNORE
from cli_jax.data import Sample, Sizes, collate
from cli_jax.data.collate import Extent
from cli_jax.data.packing import Packer

N = small.VISION.num_patches
SIZES = Sizes(rows=3, length=24, visual=14, tiles=4, images=3, tile_size=8, patches=N, text=18)


@st.composite
def samples(draw):
    """A sample of random content that fits a row: pictures of one tile, some with a newline."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    newlines = draw(st.lists(st.booleans(), max_size=2))  # per picture
    slots = [N + newline for newline in newlines]
    v, m = sum(slots), len(slots)
    n = v + draw(st.integers(1, min(SIZES.length - v, SIZES.text)))
    position = np.sort(rng.choice(n, v, replace=False))
    newline = np.concatenate([np.arange(s) >= N for s in slots] or [np.zeros(0, bool)])
    image = np.repeat(np.arange(m), slots)
    patch = np.concatenate([rng.permutation(s) % N for s in slots] or [np.zeros(0, int)])
    # Two reads per slot, neighbours with distinct patches: no patch twice with weight in a slot.
    first = rng.uniform(0.1, 0.9, v)
    weight = np.stack([first, 1 - first, 0 * first, 0 * first], -1) * ~newline[:, None]
    index = np.stack([patch, (patch + 1) % N, patch * 0, patch * 0], -1) + image[:, None] * N
    return Sample(
        id="x",
        ids=rng.integers(1, 99, n).astype(np.int32),
        labels=np.where(rng.random(n) < 0.5, IGNORE, 1).astype(np.int32),
        visual_position=position.astype(np.int32),
        visual_image=image.astype(np.int32),
        visual_newline=newline,
        plan_index=index.astype(np.int32),
        plan_weight=weight.astype(np.float32),
        tiles=rng.integers(0, 256, (m, 8, 8, 3)).astype(np.uint8),
        context_end=rng.integers(0, n + 1, m).astype(np.int32),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(samples(), max_size=30), st.integers(0, 4))
def test_the_packer_loses_and_repeats_nothing(stream, open_rows):
    packer = Packer(SIZES.row, open_rows)
    closed = []
    for key, sample in enumerate(stream):
        row = packer.place(key, sample)
        closed += [] if row is None else [row]
        assert len(packer.rows) <= open_rows
    keys = [key for row in [*closed, *packer.rows] for key, _ in row]
    assert sorted(keys) == list(range(len(stream)))
    for row in [*closed, *packer.rows]:
        totals = np.sum([sample.extent for _, sample in row], axis=0)
        assert (totals <= SIZES.row).all()
        assert [key for key, _ in row] == sorted(key for key, _ in row)
        assert all(sample is stream[key] for key, sample in row)
    # Rows close in the order in which they were opened, so no sample waits for ever.
    opened = [row[0][0] for row in [*closed, *packer.rows]]
    assert opened == sorted(opened)
    if open_rows == 0:
        assert keys == list(range(len(stream)))
        assert all(len(row) == 1 for row in closed)


def test_a_sample_joins_the_first_row_that_has_room_in_every_dimension():
    def sized(*extent):
        n, v, m, i = extent
        return Sample(
            "x", np.zeros(n), np.zeros(n), np.zeros(v), None, None, None, None,
            np.zeros((m, 8, 8, 3)), np.zeros(i),
        )  # fmt: skip

    packer = Packer(Extent(10, 10, 4, 2, 10), 2)
    stream = [(8, 0, 0, 0), (5, 0, 3, 1), (2, 0, 2, 1), (4, 0, 1, 1), (1, 0, 0, 1), (1, 0, 0, 0)]
    closed = [packer.place(key, sized(*extent)) for key, extent in enumerate(stream)]
    assert [row and [key for key, _ in row] for row in closed] == [None] * 4 + [[0, 2], None]
    # 4 met no room for its tokens in the first row and none for its image in the second.
    assert [[key for key, _ in row] for row in packer.rows] == [[1, 3, 5], [4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(samples(), min_size=1, max_size=12))
def test_packed_rows_hold_the_same_samples_as_unpacked_ones(stream):
    packer = Packer(SIZES.row, 2)
    rows = [row for key, s in enumerate(stream) if (row := packer.place(key, s)) is not None]
    rows = [[sample for _, sample in row] for row in [*rows, *packer.rows]]
    packed, alone = [], []
    for at in range(0, len(rows), SIZES.rows):
        packed += small.unpack(collate(rows[at : at + SIZES.rows], SIZES))
    for at in range(0, len(stream), SIZES.rows):
        alone += small.unpack(collate([[s] for s in stream[at : at + SIZES.rows]], SIZES))
    want = sorted(map(small.key, stream))
    assert sorted(map(small.key, alone)) == want
    assert sorted(map(small.key, packed)) == want


@settings(max_examples=60, deadline=None)
@given(st.lists(samples(), min_size=1, max_size=12))
def test_no_plan_reads_another_sample_and_the_inverse_is_exact(stream):
    packer = Packer(SIZES.row, 2)
    for key, sample in enumerate(stream):
        packer.place(key, sample)
    batch = collate([[s for _, s in row] for row in packer.rows], SIZES)
    for b, row in enumerate(packer.rows):
        owner = np.repeat(np.arange(len(row)), [sample.extent.tiles for _, sample in row])
        slot_owner = np.repeat(np.arange(len(row)), [s.extent.visual for _, s in row])
        index, weight = batch["plan_index"][b], batch["plan_weight"][b]
        for slot, sample in enumerate(slot_owner):
            assert (owner[index[slot][weight[slot] > 0] // N] == sample).all()
        entries = [
            sorted(e for e in patch if e < SIZES.visual * 4) for patch in batch["plan_inverse"][b]
        ]
        for patch, reads in enumerate(entries):
            want = np.flatnonzero((index.ravel() == patch) & (weight.ravel() > 0))
            assert reads == want.tolist()


def test_padding_says_nothing():
    batch = collate([], SIZES)
    assert small.unpack(batch) == []
    assert (batch["visual_image"] == SIZES.images).all()
    assert (batch["visual_position"] == SIZES.length).all()
    assert (batch["visual_index"] == SIZES.visual).all()
    assert (batch["plan_inverse"] == SIZES.visual * 4).all()
    assert batch["pixel_values"].shape == (3, 4, 8, 8, 3)


@given(samples())
def test_what_does_not_fit_is_refused(sample):
    n = len(sample.ids)
    rows = [[sample] * (SIZES.length // n + 1)]
    with pytest.raises(ValueError, match="does not fit its row"):
        collate(rows, SIZES)
    with pytest.raises(ValueError, match="4 rows do not fit a batch of 3"):
        collate([[sample]] * 4, SIZES)
