"""Prompts with extra tokens and tiles: the cache's answers are those of whole forward passes."""

import dataclasses

import jax
import numpy as np
import pytest

from cli_jax.evaluate.prompts import load_prompts, prompt_spec, read_questions
from cli_jax.fusion import registry
from cli_jax.fusion.deepstack import DeepStackConfig
from cli_jax.generate.buckets import batches
from cli_jax.generate.engine import Generator
from cli_jax.text import load_tokenizer
from tests.evaluate import eval_small as small

NEW = 3


def experiment_of(folder, fusion):
    base = small.make_experiment(folder)
    name, settings = fusion["name"], {k: v for k, v in fusion.items() if k != "name"}
    strategy = registry.get(name).Config(**settings)
    model = dataclasses.replace(base.model, fusion_name=name, fusion=strategy)
    vision = dataclasses.replace(model.vision, image_size=16, num_hidden_layers=3)  # 16 patches
    sides = [(16 * i, 16 * j) for i in (1, 2) for j in (1, 2)]
    image = dataclasses.replace(model.image, grid_pinpoints=tuple(sides))
    return dataclasses.replace(base, model=dataclasses.replace(model, vision=vision, image=image))


@pytest.mark.parametrize(
    "fusion",
    [{"name": "deepstack", "stacks": 1}, {"name": "dense_connector", "variant": "sti"}],
    ids=lambda fusion: fusion["name"],
)
def test_greedy_equals_whole_forward_passes(tmp_path, fusion, monkeypatch):
    experiment = experiment_of(tmp_path, fusion)
    monkeypatch.setattr(small.batch_lib, "empty", _empty_for(experiment, small.batch_lib.empty))
    model, params = small.make_model(experiment)
    questions = read_questions(small.save_questions(tmp_path, 3))
    spec = prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), NEW)
    prompts = list(load_prompts(questions, str(tmp_path), spec))
    assert all(not isinstance(sample, str) for _, sample in prompts)
    generator = Generator(model, params, stop_ids=[len(small.PIECES)], pad_id=0, max_new_tokens=NEW)
    variables = {"params": params}

    @jax.jit
    def best(batch, last):
        hidden = model.apply(variables, batch).hidden
        rows = np.arange(len(hidden))
        logits = model.apply(variables, hidden[rows, last], method="logits")
        return jax.numpy.argmax(logits, -1)

    with_pictures = 0
    for group in batches(iter(prompts), 2, spec.vision, spec.extras):
        answers = generator(group.batch, group.numbers)
        batch = {name: np.array(value) for name, value in group.batch.items()}
        length = (batch["segment_ids"] > 0).sum(1)
        room = batch["input_ids"].shape[1]
        for step in range(NEW):
            rows = np.arange(len(group.numbers))
            tokens = np.asarray(best(batch, length + step - 1))
            assert [a.ids[step] for a in answers] == tokens[rows].tolist()
            at = rows, (length + step)[rows]
            if (at[1] >= room).any():
                break
            batch["input_ids"][at], batch["positions"][at] = tokens[rows], at[1]
            batch["segment_ids"][at] = 1
        assert step > 0
        with_pictures += (batch["image_segment"] > 0).any()
    assert with_pictures


def _empty_for(experiment, empty):
    extras = experiment.extras
    return lambda **sizes: empty(**{"pooled": extras.pooled, "stacks": extras.stacks, **sizes})


def test_blank_pictures_have_as_many_tiles(tmp_path):
    experiment = experiment_of(tmp_path, {"name": "deepstack", "stacks": 1})
    image = dataclasses.replace(experiment.model.image, aspect_ratio="square")
    model = dataclasses.replace(
        experiment.model, image=image, fusion=DeepStackConfig(stacks=2, start=0)
    )
    experiment = dataclasses.replace(experiment, model=model)
    questions = read_questions(small.save_questions(tmp_path, 2))
    spec = prompt_spec(experiment, load_tokenizer(experiment.data.tokenizer), NEW)
    seen, blank = (
        [sample for _, sample in load_prompts(questions, str(tmp_path), spec, blank=blank)]
        for blank in (False, True)
    )
    for a, b in zip(seen, blank, strict=True):
        assert a.extent == b.extent
        assert a.extent.tiles == 3
        assert (a.tiles != b.tiles).any()
