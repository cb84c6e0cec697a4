import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_jax.config import VisionConfig
from cli_jax.data import Sample
from cli_jax.data.collate import Extent
from cli_jax.generate.buckets import VISUAL_UNIT, batches, bucket, round_up

VISION = VisionConfig(image_size=4, patch_size=2)


def sample(text, visual=0):
    images = int(visual > 0)
    return Sample(
        id="s",
        ids=np.ones(text + visual, np.int32),
        labels=np.full(text + visual, -100, np.int32),
        visual_position=np.arange(visual, dtype=np.int32),
        visual_image=np.zeros(visual, np.int32),
        visual_newline=np.zeros(visual, bool),
        plan_index=np.zeros((visual, 4), np.int32),
        plan_weight=np.zeros((visual, 4), np.float32),
        tiles=np.zeros((images, 4, 4, 3), np.uint8),
        context_end=np.full(images, text + visual, np.int32),
    )


@pytest.mark.parametrize(
    ("size", "rounded"),
    [(0, 32), (1, 32), (32, 32), (33, 64), (256, 256), (257, 320), (8829, 10240)],
)
def test_round_up(size, rounded):
    assert round_up(size, 32) == rounded


@given(st.integers(0, 40_000), st.sampled_from([1, 32]))
def test_rounding_never_shrinks_and_wastes_at_most_a_quarter(size, unit):
    rounded = round_up(size, unit)
    assert rounded >= size
    assert rounded % unit == 0
    assert round_up(rounded, unit) == rounded
    if size > 8 * unit:
        assert rounded - size < size / 4


def test_few_buckets_hold_every_length():
    assert len({round_up(n, VISUAL_UNIT) for n in range(32_768)}) <= 8 + 4 * 7


@given(st.integers(1, 500), st.integers(0, 9000), st.integers(0, 37), st.integers(0, 20))
def test_a_bucket_holds_its_prompt(text, visual, tiles, images):
    extent = Extent(text + visual, visual, tiles, images, text)
    assert all(room >= need for room, need in zip(bucket(extent), extent, strict=True))


def test_every_prompt_comes_out_once_in_batches_of_its_bucket():
    rng = np.random.default_rng(0)
    prompts = [(i, sample(*rng.integers(1, 200, 2))) for i in range(40)]
    groups = list(batches(iter(prompts), 3, VISION))
    assert sorted(n for numbers, _ in groups for n in numbers) == list(range(40))
    for numbers, batch in groups:
        assert 1 <= len(numbers) <= 3
        rows, length = batch["input_ids"].shape
        assert rows == 3
        lengths = (batch["segment_ids"] > 0).sum(axis=1).tolist()
        expected = [prompts[n][1].extent for n in numbers]
        assert lengths == [e.tokens for e in expected] + [0] * (3 - len(numbers))
        assert {bucket(e) for e in expected} == {
            Extent(length, batch["plan_index"].shape[1], *batch_tail(batch))
        }


def batch_tail(batch):
    return (
        batch["pixel_values"].shape[1],
        batch["image_segment"].shape[1],
        batch["text_position"].shape[1],
    )


def test_a_full_group_does_not_wait_for_the_end():
    seen = []

    def stream():
        for i in range(6):
            seen.append(i)
            yield i, sample(10)

    first = next(batches(stream(), 2, VISION))
    assert first.numbers == [0, 1]
    assert seen == [0, 1]


def test_questions_of_usual_length_about_one_picture_size_share_a_bucket():
    assert len({bucket(Extent(100 + text, 100, 1, 1, text)) for text in range(1, 65)}) == 1
