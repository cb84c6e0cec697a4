"""How well do the towers find the captions of pictures that they have not been trained on?"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from cli_jax.data import SampleSpec, Sizes, collate, make_sample
from cli_jax.data.augment import NO_AUGMENTATION
from cli_jax.data.ledger import drop_of
from cli_jax.data.sample import Sample
from cli_jax.data.sources import DataError, open_sources
from cli_jax.experiment import Experiment
from cli_jax.output import write_lines
from cli_jax.pretrain.loss import pair_sums
from cli_jax.text import load_tokenizer
from cli_jax.train.loop import say, to_device
from cli_jax.train.setup import Setup
from cli_jax.train.state import Params, TrainState
from cli_jax.train.workdir import read_lines

FILE = "held_out.jsonl"


class HeldOut:
    """Measures every checkpoint of a run on its held-out rows, into `held_out.jsonl`."""

    def __init__(self, experiment: Experiment, folder: epath.Path) -> None:
        self._samples, left_out = read_samples(experiment)
        self._path = folder / FILE
        self._embed: Any = None
        if left_out:
            say(f"held out: {left_out} rows cannot be used")

    def __call__(self, setup: Setup, state: TrainState) -> None:
        """Appends a line in the place of what an earlier process wrote of later steps, unless the
        last one is of this step."""
        step = int(state.step)
        lines = read_lines(self._path)
        if lines and lines[-1]["step"] == step:
            return
        line = {"step": step, **self.measure(setup, state.params)}
        if jax.process_index() == 0:
            kept = [old for old in lines if old["step"] < step]
            write_lines(self._path, (*kept, line))
        say(
            f"step {step}: {line['retrieval']:.1%} of {line['pictures']} held-out pictures find "
            f"their own among {line['captions']} captions; loss {line['loss']:.4f}"
        )

    def measure(self, setup: Setup, params: Params) -> dict[str, float]:
        """`loss`, in batches as in training (the last one may be smaller), and the retrieval.

        `retrieval`: the share of `pictures` that lie nearest to their own caption, of the distinct
        `captions` of all of them.
        """
        rows = setup.experiment.data.batch_size
        sizes = Sizes.from_config(setup.experiment.data, setup.experiment.model.vision, rows)
        embed = self._compiled(setup)
        loss, weight = 0.0, 0.0
        found: list[tuple[np.ndarray, ...]] = []
        with setup.context():
            for start in range(0, len(self._samples), rows):
                some = self._samples[start : start + rows]
                batch = collate([[sample] for sample in some], sizes)
                mine = rows // jax.process_count()
                at = slice(jax.process_index() * mine, (jax.process_index() + 1) * mine)
                own = {name: value[at] for name, value in cast(dict, batch).items()}
                sums, *pair = jax.device_get(embed(params, to_device(setup, own)))
                loss, weight = loss + float(sums.loss), weight + float(sums.weight)
                found.append(tuple(x[: len(some)] for x in pair))
        picture, caption = (np.concatenate(part) for part in zip(*found, strict=True))
        texts = [sample.ids.tobytes() for sample in self._samples]
        return {"loss": loss / weight, **retrieval(picture, caption, texts)}

    def _compiled(self, setup: Setup) -> Any:
        if self._embed is None:
            apply: Any = setup.model.apply

            def embed(params: Params, batch: dict[str, jax.Array]) -> Any:
                found = apply({"params": params}, batch)
                sums = pair_sums(found.logits, found.same, found.used)
                return sums, found.picture, found.caption

            everywhere = NamedSharding(setup.mesh, PartitionSpec())
            self._embed = jax.jit(embed, out_shardings=everywhere)
        return self._embed


def retrieval(
    picture_nxD: np.ndarray, caption_nxD: np.ndarray, texts: list[bytes]
) -> dict[str, float]:
    """The share of pictures nearest to their own caption, among all distinct texts."""
    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    own = np.array([first[text] for text in texts])
    candidates = np.unique(own)
    nearest = candidates[np.argmax(picture_nxD @ caption_nxD[candidates].T, axis=1)]
    return {
        "retrieval": float(np.mean(nearest == own)),
        "pictures": len(texts),
        "captions": len(candidates),
    }


def read_samples(experiment: Experiment) -> tuple[list[Sample], int]:
    """The held-out rows as they are, not augmented, and how many of them cannot be used."""
    data, model = experiment.data, experiment.model
    spec = SampleSpec.from_config(data, model.image, model.vision, load_tokenizer(data.tokenizer))
    spec = dataclasses.replace(spec, augmentation=NO_AUGMENTATION, one_question=False)
    samples, left_out = [], 0
    for i, (file, _, root) in enumerate(zip(*open_sources(data, "held_out"), strict=True)):
        for index in range(len(file)):
            try:
                samples.append(make_sample(file[index], root, spec))
            except Exception as error:
                if drop_of(error, i, index, "") is None:
                    raise
                left_out += 1
    if not samples:
        raise DataError("config.data.held_out: none of the held-out rows can be used")
    return samples, left_out
