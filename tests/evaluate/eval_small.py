"""A small model, tokenizer and set of questions on disk, for the tests that ask and look inside."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cli_jax import batch as batch_lib
from cli_jax.experiment import Experiment, from_dict, to_dict
from cli_jax.model.vlm import build
from cli_jax.train.checkpoint import Checkpoints
from cli_jax.train.state import TrainState

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PIECES = (*SPECIALS, "<unk>", "\n", "system", "user", "assistant", *map(chr, range(32, 127)))


def save_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> str:
    """One id per character, and the special tokens of qwen_1_5 and `more`."""
    vocabulary = {p: i for i, p in enumerate((*PIECES, *more))}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"system|user|assistant|[\s\S]"), "isolated")
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (*SPECIALS, *more)])
    backend.decoder = decoders.Fuse()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return str(folder)


def make_experiment(folder: Path, **fusion: Any) -> Experiment:
    """A CLI model of two vision and two decoder layers; `fusion` changes its strategy's config."""
    name = fusion.pop("name", "cli")
    cli = {"taps": [1, 2], "inject": "all", "rank": 2, "gate_rank": 2}
    tile = 8
    return from_dict(
        {
            "name": "small",
            "model": {
                "vision": {
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": tile,
                    "patch_size": 4,
                },
                "text": {
                    "vocab_size": len(PIECES),
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "tie_word_embeddings": False,
                    "max_position_embeddings": 512,
                },
                "image": {
                    "aspect_ratio": "anyres_max_4",
                    "grid_pinpoints": [[tile * i, tile * j] for i in (1, 2) for j in (1, 2)],
                },
            },
            "fusion": {"name": name, name: {**(cli if name == "cli" else {}), **fusion}},
            "data": {
                "tokenizer": save_tokenizer(folder / "tokenizer"),
                "labels": "answer_only",
                "batch_size": 2,
                "row_length": 64,
                "visual_per_row": 24,
                "tiles_per_row": 4,
                "images_per_row": 2,
            },
            "compute": {"dtype": "float32", "remat": "none", "scan_layers": False},
            "eval": {"batch_size": 4, "max_new_tokens": 6},
        }
    )


def make_model(experiment: Experiment) -> tuple[Any, Any]:
    """The model and parameters in which nothing is zero, so that everything has an effect."""
    model = build(experiment.model, experiment.compute)
    vision = experiment.model.vision
    row = batch_lib.empty(
        rows=1, length=4, visual=2, tiles=1, images=1,
        tile_size=vision.image_size, patches=vision.num_patches, text=2,
    )  # fmt: skip
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), row)["params"])
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        fan_in = leaf.shape[-2] if leaf.ndim > 1 and "embedding" not in name else 4
        noise = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        return jnp.asarray(("scale" in name) + noise, leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def save_workdir(folder: Path, experiment: Experiment, params: Any) -> Path:
    """A workdir with one checkpoint, as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(experiment)))
    checkpoints = Checkpoints(folder, experiment.checkpoint)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    checkpoints.save(TrainState(jnp.int32(3), params, {}), data, experiment, "test")
    checkpoints.wait()
    checkpoints.close()
    return folder


def load_command(name: str) -> Any:
    """The module of an entry point, e.g. eval.py."""
    path = Path(__file__).parents[2] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"command_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def question(number: int, image: Any = None, **changes: Any) -> dict[str, Any]:
    """One row; every question has another length."""
    slots = 0 if image is None else len(image) if isinstance(image, list) else 1
    ask = "<image>\n" * slots + "How many" + " more" * (number % 4) + "?"
    row = {
        "id": f"q{number}",
        "category": ("few", "many")[number % 2],
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": f"{number}"}],
    }
    return {**row, **({} if image is None else {"image": image}), **changes}


def save_picture(folder: Path, name: str, size: tuple[int, int], seed: int | None = None) -> str:
    """Noise, or a uniform 127 gray without a seed."""
    pixels = np.full((size[1], size[0], 3), 127, np.uint8)
    if seed is not None:
        pixels = np.random.default_rng(seed).integers(0, 256, pixels.shape, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return name


def save_questions(folder: Path, count: int) -> Path:
    """Questions about one picture each, of one shape, so that few programs are compiled."""
    pictures = [save_picture(folder, f"p{i}.png", (14, 9), i) for i in range(count)]
    return save_rows(folder, [question(i, picture) for i, picture in enumerate(pictures)])


def save_mixed_questions(folder: Path) -> Path:
    """Questions with no, one and two pictures in turn, of several shapes."""
    rows = []
    for i in range(6):
        names = [
            save_picture(folder, f"m{i}_{j}.png", (6 + 5 * i % 19, 9 + 4 * j), seed=i)
            for j in range(i % 3)
        ]
        rows.append(question(i, names if len(names) > 1 else names[0] if names else None))
    return save_rows(folder, rows, "mixed.json")


def save_rows(folder: Path, rows: list[Any], name: str = "questions.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(rows))
    return path
