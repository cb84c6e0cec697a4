"""A tiny experiment and a data iterator with a position, for the tests of training."""

from __future__ import annotations

from typing import Any

import grain
import jax
import numpy as np

from cli_jax import batch as batch_lib
from cli_jax.batch import IGNORE, Batch
from cli_jax.experiment import Experiment, from_dict
from cli_jax.train.loop import rows_per_process

VOCAB = 61

# Compiler options for programs that run a few times: less optimization, a third of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def config() -> dict[str, Any]:
    """A model of some ten thousand parameters with every part: vision, projector, CLI, decoder."""
    return {
        "name": "tiny",
        "model": {
            "vision": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "text": {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "tie_word_embeddings": False,
                "initializer_range": 0.2,
            },
            "image": {"aspect_ratio": "square"},
        },
        "fusion": {"name": "cli", "cli": {"taps": "all", "inject": "all", "rank": 2}},
        "data": {
            "batch_size": 8,
            "row_length": 24,
            "visual_per_row": 10,
            "tiles_per_row": 2,
            "images_per_row": 2,
        },
        "optimizer": {"lr": 1e-2, "warmup_ratio": 0.0, "eps": 1e-4},
        "compute": {"dtype": "float32", "remat": "none", "scan_layers": False},
        "checkpoint": {"every": 3},
        "log": {"every": 1},
        "total_steps": 7,
    }


def experiment(**changes: Any) -> Experiment:
    """The tiny experiment; `section={...}` updates a section, `key=value` sets a scalar."""
    return changed(config(), changes)


def changed(base: dict[str, Any], changes: dict[str, Any]) -> Experiment:
    """The experiment of a config; a dictionary updates a section, another value replaces one."""
    merged = {
        name: {**base.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return from_dict({**base, **merged})


def make_batch(experiment: Experiment, seed: int, rows: int | None = None) -> Batch:
    """Rows with two samples and a picture each, of random lengths and contents, then padding."""
    rng, data = np.random.default_rng(seed), experiment.data
    vision = experiment.model.vision
    N = vision.num_patches
    batch = batch_lib.empty(
        rows=rows or data.batch_size,
        length=data.row_length,
        visual=data.visual_per_row,
        tiles=data.tiles_per_row,
        images=data.images_per_row,
        tile_size=vision.image_size,
        patches=N,
    )
    batch["pixel_values"][:] = rng.integers(0, 256, batch["pixel_values"].shape)
    batch["input_ids"][:] = rng.integers(0, VOCAB, batch["input_ids"].shape)
    for row in range(len(batch["input_ids"])):
        start = 0
        for image in range(2):
            stop = start + int(rng.integers(N + 4, 12))
            place = np.arange(start, stop)
            batch["segment_ids"][row, place] = image + 1
            batch["positions"][row, place] = place - start
            answer = place[N + 2 :]  # after a first token, the picture and its newline
            batch["labels"][row, answer] = batch["input_ids"][row, answer]
            slots, patches = np.arange(N + 1) + image * (N + 1), np.arange(N) + image * N
            batch["plan_index"][row, slots[:N], 0] = patches
            batch["plan_weight"][row, slots[:N], 0] = 1
            batch["plan_inverse"][row, patches, 0] = slots[:N] * 4
            batch["visual_newline"][row, slots[N]] = True
            batch["visual_image"][row, slots] = image
            batch["visual_position"][row, slots] = place[1 : N + 2]
            batch["visual_index"][row, place[1 : N + 2]] = slots
            batch["image_segment"][row, image] = image + 1
            batch["context_end"][row, image] = start + N + 2
            start = stop
    assert (batch["labels"] != IGNORE).any()
    return batch


class Data(grain.DatasetIterator):
    """Batch i is made from seed i; the position is the whole state, on any number of processes."""

    any_process_count = True

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.experiment, self.position = experiment, 0

    def __next__(self) -> Batch:
        self.position += 1
        batch = make_batch(self.experiment, self.position)
        rows = rows_per_process(self.experiment)
        mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        return {name: value[mine] for name, value in batch.items()}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
