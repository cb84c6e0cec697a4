"""Generation with the real model: pictures in prefill, cache in decode."""

import dataclasses

import numpy as np
import pytest

from cli_jax.data import Sizes, collate
from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.generate.engine import Generator
from cli_jax.generate.sampling import Sampling
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small
from tests.generate.whole_passes import greedy

NEW = 32
GREEDY = Sampling()
WARM = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)


class Setting:
    """The model, six prompts with up to two pictures, and generators that are compiled once."""

    def __init__(self, folder):
        self.experiment = small.make_experiment(folder, context="prompt")
        questions = read_questions(small.save_mixed_questions(folder))
        spec = prompt_spec(self.experiment, load_tokenizer(self.experiment.data.tokenizer), NEW)
        self.samples = [sample for _, sample in load_prompts(questions, str(folder), spec)]
        self.model, self.params = small.make_model(self.experiment)
        self.generators = {
            sampling: Generator(
                self.model,
                self.params,
                stop_ids=[len(small.PIECES)],  # never
                pad_id=0,
                max_new_tokens=NEW,
                sampling=sampling,
            )
            for sampling in (GREEDY, WARM)
        }

    def batch(self, samples, rows, length):
        vision = self.experiment.model.vision
        sizes = Sizes(
            rows=rows, length=length, visual=32, tiles=5, images=2,
            tile_size=vision.image_size, patches=vision.num_patches,
        )  # fmt: skip
        return collate([[sample] for sample in samples], sizes)

    def generate(self, rows, sampling=GREEDY, samples=None):
        samples = samples or self.samples
        found = []
        for start in range(0, len(samples), rows):
            part = samples[start : start + rows]
            numbers = range(start, start + len(part))
            found += self.generators[sampling](self.batch(part, rows, length=100), numbers)
        return [answer.ids for answer in found]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("small"))


def test_greedy_equals_the_argmax_of_whole_forward_passes(setting):
    """Every answer token from a forward pass over prompt and answer so far, without any cache."""
    count = len(setting.samples)
    batch = setting.batch(setting.samples, count, length=100 + NEW)
    found = setting.generate(rows=count)
    assert found == greedy(setting.model, setting.params, batch, NEW)
    assert len({tuple(ids) for ids in found}) == count


def test_batches_of_one_give_the_same_tokens_as_larger_ones(setting):
    one = setting.generate(rows=1)
    assert setting.generate(rows=4) == one  # the second batch has two left-over rows
    assert setting.generate(rows=6) == one


def test_sampling_gives_the_same_tokens_in_every_batch(setting):
    one = setting.generate(rows=1, sampling=WARM)
    assert setting.generate(rows=4, sampling=WARM) == one
    assert len({tuple(ids) for ids in one}) == len(one)


def test_pictures_change_the_answer(setting):
    dark = [dataclasses.replace(s, tiles=np.zeros_like(s.tiles)) for s in setting.samples]
    seen, unseen = setting.generate(rows=6), setting.generate(rows=6, samples=dark)
    for sample, a, b in zip(setting.samples, seen, unseen, strict=True):
        assert (a != b) == (len(sample.tiles) > 0)
