"""A tiny set of pictures with three boxes, asked as NLVR's are, and a tiny pretraining on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from cli_jax.demo import TOKENIZER
from cli_jax.experiment import Experiment
from tests.train import train_tiny

BOXES = ("left", "middle", "right")
COLORS = {"black": (0, 0, 0), "blue": (0, 100, 255), "yellow": (255, 220, 40)}
TILE = 8


def talk(pairs):
    turns = []
    for i, (question, answer) in enumerate(pairs):
        slot = "" if i else "<image>\n"
        asked = f"{slot}{question}\nAnswer with a single number."
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": str(answer)}]
    return turns


def draw_row(folder: Path, scene: int, arrangement: int, rng) -> dict:
    """A gray picture of 24 x 8 pixels with 0 to 3 dots per box, and all questions on color."""
    pixels = np.full((TILE, 3 * TILE, 3), 200, np.uint8)
    pairs = []
    for place, box in enumerate(BOXES):
        cells = rng.permutation(4)
        colors = rng.choice(list(COLORS), rng.integers(0, 4))
        for cell, color in zip(cells, colors, strict=False):
            y, x = 4 * (cell // 2) + 1, TILE * place + 4 * (cell % 2) + 1
            pixels[y : y + 2, x : x + 2] = COLORS[color]
        pairs.append((f"How many objects are in the {box} box?", len(colors)))
        pairs += [
            (f"How many {color} objects are in the {box} box?", int(np.sum(colors == color)))
            for color in COLORS
        ]
    name = f"s{scene}-{arrangement}"
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return {"id": name, "image": f"{name}.png", "conversations": talk(pairs)}


def write_data(folder: Path, scenes: int) -> None:
    """train.json with two pictures per scene, and a val.json that nothing should open."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [draw_row(folder, scene, i, rng) for scene in range(scenes) for i in range(2)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text("not to be read")


def experiment(root: Path, **changes) -> Experiment:
    """A tower of two layers, a tile per box; `section={...}` updates a section."""
    model = train_tiny.config()["model"]
    config = {
        "name": "tiny_pretrain",
        "objective": "siglip",
        "model": {
            "vision": {
                **model["vision"],
                "num_hidden_layers": 2,
                "image_size": TILE,
                "initializer_range": 1.0,
            },
            "text": {**model["text"], "vocab_size": 320, "initializer_range": 0.1},
            "image": {"aspect_ratio": "anyres_max_1", "grid_pinpoints": [[TILE, 3 * TILE]]},
        },
        "fusion": {"name": "none"},
        "data": {
            "root": str(root),
            "train": [{"path": str(root / "train.json")}],
            "tokenizer": str(TOKENIZER),
            "template": "plain",
            "captions": "coarse",
            "held_out": 0.2,
            "scene": r"-\d$",
            "pack": False,
            "batch_size": 16,
            "row_length": 64,
            "visual_per_row": 8,
            "tiles_per_row": 5,  # one more than a picture takes
            "images_per_row": 1,
        },
        "optimizer": {"lr": 3e-3, "warmup_ratio": 0.0, "b2": 0.98, "schedule": "constant"},
        "compute": {"dtype": "float32", "remat": "none", "scan_layers": False},
        "checkpoint": {"every": 2},
        "log": {"every": 1},
        "total_steps": 4,
    }
    return train_tiny.changed(config, changes)
