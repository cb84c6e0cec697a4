"""A tiny comparison on pictures made on the spot, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cli_jax.demo import TOKENIZER
from tests.train import train_tiny

TRAIN, VAL = 20, 6  # pictures
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def write_data(folder: Path) -> Path:
    """train.json has a row of two questions per picture, val.json a row per question."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for i in range(TRAIN + VAL):
        split = "train" if i < TRAIN else "val"
        (folder / split).mkdir(parents=True, exist_ok=True)
        color = list(COLORS)[i % 2]
        pixels = np.full((12, 12, 3), COLORS[color], np.uint8)
        pixels[:, : 1 + i % 3] = rng.integers(0, 256, (12, 1 + i % 3, 3))
        path = f"{split}/scene{i // 2}-{i % 2}.png"
        Image.fromarray(pixels).save(folder / path)
        asked = {"color": ("Which color?", color), "count": ("How many?", str(1 + i % 3))}
        if split == "train":
            turns = [t for question, answer in asked.values() for t in turn(question, answer)]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            rows[split].append({"id": f"t{i}", "image": path, "conversations": turns})
        for category, (question, answer) in asked.items() if split == "val" else ():
            talk = turn("<image>\n" + question, answer)
            row = {"id": f"v{i}-{category}", "image": path, "category": category}
            rows[split].append({**row, "conversations": talk})
    for split, content in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def arm(name: str, fusion: str, reported: bool = True, **settings: Any) -> dict[str, Any]:
    changes = {"fusion": {"name": fusion, fusion: settings}}
    return {"name": name, "changes": changes, "reported": reported}


def config(root: Path, **compare: Any) -> dict[str, Any]:
    """Two arms and a candidate, two seeds; `compare` changes the section of that name."""
    base = train_tiny.config()
    base["model"]["vision"]["num_hidden_layers"] = 2
    base["model"]["text"]["vocab_size"] = 320
    base["data"] = {
        "root": str(root),
        "train": [{"path": "train.json"}],
        "tokenizer": str(TOKENIZER),
        "labels": "answer_only",
        "turns": "one",
        "batch_size": 4,
        "row_length": 48,
        "visual_per_row": 6,
        "tiles_per_row": 1,
        "images_per_row": 1,
        "pack": False,
        "held_out": 0.2,
    }
    base["eval"] = {"batch_size": 4, "max_new_tokens": 2}
    projector = {"pattern": "(multi_modal_projector|fusion)/.*|image_newline", "lr": 1e-2}
    frozen = {"optimizer": {"groups": [projector, {"pattern": ".*", "lr": None}]}}
    return base | {
        "name": "tiny comparison",
        "compare": {
            "arms": [
                arm("none", "none"),
                arm("cli", "cli"),
                arm("layer_1", "none", reported=False, vision_layer=1),
            ],
            "select": [{"name": "best layer", "arms": ["none", "layer_1"]}],
            "evals": [
                {"name": "val", "path": "val.json"},
                {"name": "colors", "path": "val.json", "categories": ["color"]},
            ],
            "seeds": [0, 1],
            "stage1": {"steps": 2, "changes": frozen},
            "stage2": {"steps": 4},
            "eval_every": 2,
            "draws": 200,
            **compare,
        },
    }
