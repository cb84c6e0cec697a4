"""Rows with a limit on text: samples that exceed it, rows packed online and offline, prompts."""

import dataclasses

import numpy as np
import pytest
import small
from binned import TOKENIZER, bin_up, close, loaders, take

from cli_jax.data import Sizes, collate
from cli_jax.data.best_fit import pack
from cli_jax.data.collate import Extent
from cli_jax.data.pipeline import report
from cli_jax.data.sample import SampleSpec, make_sample
from cli_jax.experiment import ConfigError
from cli_jax.generate.buckets import batches

LIMIT = 90  # characters; the template and the system prompt of a sample take 60


@pytest.fixture
def data(tmp_path):
    """Twelve rows of which one in three has no picture; one more has too much text."""
    rows = [*small.mixed_rows(tmp_path, 12), small.row("long", "Q" * LIMIT)]
    return small.config(small.write(tmp_path, rows), text_per_row=LIMIT)


def text_of(batch):
    return (batch["segment_ids"] > 0).sum(1) - (batch["visual_position"] < 256).sum(1)


def test_rows_without_the_limit_hold_more_text(data):
    """So the limit is what decides below."""
    parts = loaders(dataclasses.replace(data, text_per_row=0))
    free = take(parts, 3)
    close(parts)
    assert max(text_of(batch).max() for batch in free) > LIMIT
    assert free[0]["text_position"].shape == (4, 0)
    assert free[0]["text_index"].shape == (4, 0)


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_packed_rows_keep_to_the_limit(data, tmp_path, offline):
    if offline:
        data, notes = bin_up(data, tmp_path / "bins.npz")
        assert notes["left_out"] == 1
        assert notes["fill"]["text"] == pytest.approx(
            notes["fill"]["tokens"] * 256 / LIMIT - notes["fill"]["visual"] * 48 / LIMIT
        )
        with pytest.raises(ConfigError, match=r"row was \[256, 48, 8, 4, 90\] and is"):
            loaders(dataclasses.replace(data, text_per_row=LIMIT + 1))
    parts = loaders(data)
    found = take(parts, 6)
    books = report(parts[0].get_state())
    close(parts)
    for batch in found:
        assert batch["text_position"].shape == (4, LIMIT)
        assert batch["text_index"].shape == (4, 256)
        assert (text_of(batch) <= LIMIT).all()
        small.unpack(batch)  # checks the slots
    assert books["too_long"] == ({} if offline else {"text": 1})


def test_text_beyond_its_slots_is_an_error(tmp_path):
    name = small.picture(tmp_path, "a.png", 8, 8)
    room = SampleSpec.from_config(small.DATA, small.IMAGE, small.VISION, TOKENIZER)
    sample = make_sample(small.row(0, image=name), str(tmp_path), room)
    text = sample.extent.text
    sizes = Sizes(1, 256, 48, 8, 4, 8, 4, text=2 * text)
    batch = collate([[sample, sample]], sizes)
    assert (batch["text_position"][0] < 256).all()
    with pytest.raises(ValueError, match="does not fit its row"):
        collate([[sample, sample]], dataclasses.replace(sizes, text=2 * text - 1))


def test_bins_are_bounded_by_text_alone_where_text_is_scarce():
    extents = np.array([(50, 40, 1, 1, 10)] * 12)
    offsets, _ = pack(extents, Extent(200, 200, 9, 9, 20), 0)
    assert np.diff(offsets).tolist() == [2] * 6


def test_prompts_get_as_many_slots_as_they_have_text(tmp_path):
    spec = SampleSpec.from_config(small.DATA, small.IMAGE, small.VISION, TOKENIZER)
    rows = small.mixed_rows(tmp_path, 6)
    samples = [make_sample(row, str(tmp_path), spec) for row in rows]
    for numbers, batch in batches(enumerate(samples), 2, small.VISION):
        length, slots = batch["text_index"].shape[1], batch["text_position"].shape[1]
        assert length == slots + batch["visual_position"].shape[1]
        used = (batch["text_position"] < length).sum(1)[: len(numbers)]
        assert used.tolist() == [samples[n].extent.text for n in numbers]
        small.unpack(batch)
