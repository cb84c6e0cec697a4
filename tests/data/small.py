"""A small data set on disk, a small tokenizer, and reading samples back out of batches."""

import dataclasses
import json

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cli_jax.batch import IGNORE
from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data import Sample
from cli_jax.experiment import DataConfig, SourceConfig
from cli_jax.text.tokenizer import from_backend

VISION = VisionConfig(image_size=8, patch_size=4)  # 2 x 2 patches in a tile
IMAGE = ImageConfig(
    aspect_ratio="anyres_max_4",
    grid_pinpoints=tuple((8 * i, 8 * j) for i in (1, 2) for j in (1, 2)),
)
DATA = DataConfig(
    row_length=256,
    visual_per_row=48,
    tiles_per_row=8,
    images_per_row=4,
    batch_size=2,
    labels="answer_only",
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer():
    """One id per character, and the special tokens of qwen_1_5."""
    pieces = [*SPECIALS, "<unk>", "\n", "system", "user", "assistant"]
    pieces += [chr(c) for c in range(32, 127)]
    backend = Backend(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"system|user|assistant|[\s\S]"), "isolated")
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    backend.decoder = decoders.Fuse()
    return from_backend(backend)


def picture(folder, name, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def row(index, question="<image>Q", answer="A", image=None, **more):
    return {
        "id": f"r{index}",
        **({} if image is None else {"image": image}),
        "conversations": [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ],
        **more,
    }


def write(folder, rows, name="train.json"):
    path = folder / name
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return str(path)


def mixed_rows(folder, n, start=0):
    """Rows with no, one and two pictures of several sizes; row i answers with its number."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(start, start + n):
        names = [picture(folder, f"p{i}_{j}.png", 5 + 3 * i % 17, 7 + j, i) for j in range(i % 3)]
        image = {0: None, 1: names[0] if names else None, 2: names}[i % 3]
        rows.append(row(i, "<image>" * len(names) + "Q" * (i % 5 + 1), str(i), image))
    return rows


def config(*paths, **changes):
    sources = tuple(p if isinstance(p, SourceConfig) else SourceConfig(p) for p in paths)
    return dataclasses.replace(DATA, train=sources, **changes)


def unpack(batch, patches=VISION.num_patches):
    """The samples of a batch, read back from its fields alone; checks what belongs to no sample."""
    rows, length = batch["input_ids"].shape
    found = []
    for b in range(rows):
        row = {name: field[b] for name, field in batch.items()}
        slots_used = 0
        for segment in range(1, row["segment_ids"].max() + 1):
            sample = _read(row, segment, patches)
            slots_used += len(sample.visual_position)
            found.append(sample)
        padding = row["segment_ids"] == 0
        assert (row["labels"][padding] == IGNORE).all()
        assert (row["visual_position"] < length).sum() == slots_used
        assert (row["visual_index"] < len(row["visual_position"])).sum() == slots_used
        assert (row["plan_weight"][slots_used:] == 0).all()
        _check_text(row)
    return found


def _check_text(row):
    """Text slots, where there are any, are the tokens that are neither visual nor padding."""
    slots, length = len(row["text_position"]), len(row["input_ids"])
    if not slots:
        assert len(row["text_index"]) == 0
        return
    visual = set(row["visual_position"].tolist())
    text = [at for at in range(length) if row["segment_ids"][at] and at not in visual]
    assert row["text_position"].tolist() == text + [length] * (slots - len(text))
    inverse = [text.index(at) if at in text else slots for at in range(length)]
    assert row["text_index"].tolist() == inverse


def _read(row, segment, patches):
    at = np.flatnonzero(row["segment_ids"] == segment)
    assert at.tolist() == list(range(at[0], at[-1] + 1)), "a sample is in one piece"
    assert row["positions"][at].tolist() == list(range(len(at)))
    images = np.flatnonzero(row["image_segment"] == segment)
    slots = np.flatnonzero(np.isin(row["visual_image"], images))
    assert row["visual_index"][row["visual_position"][slots]].tolist() == slots.tolist()
    index, weight = row["plan_index"][slots], row["plan_weight"][slots]
    tiles = np.unique(index[weight > 0] // patches)
    return Sample(
        id="",
        ids=row["input_ids"][at],
        labels=row["labels"][at],
        visual_position=row["visual_position"][slots] - at[0],
        visual_image=row["visual_image"][slots] - images.min(initial=len(row["image_segment"])),
        visual_newline=row["visual_newline"][slots],
        plan_index=index - tiles.min(initial=10**6) * patches,
        plan_weight=weight,
        tiles=row["pixel_values"][tiles],
        context_end=row["context_end"][images] - at[0],
    )


def key(sample):
    """All of a sample's content, comparable and hashable; plan entries without weight are equal."""
    read = np.where(sample.plan_weight > 0, sample.plan_index, -1)
    arrays = (
        sample.ids, sample.labels, sample.visual_position, sample.visual_image,
        sample.visual_newline, read, sample.plan_weight, sample.tiles, sample.context_end,
    )  # fmt: skip
    return tuple((a.shape, a.astype(np.float64).tobytes()) for a in arrays)
