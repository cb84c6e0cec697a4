"""The prepare step: extents from headers, the epoch's samples, the file, the command."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import binned
import numpy as np
import pytest
import small
from binned import bin_up
from PIL import Image, ImageFile

from cli_jax.data import DataError, SampleSpec, TooLong, make_sample
from cli_jax.data.bins import load
from cli_jax.data.collate import Extent
from cli_jax.data.offline import left_out_path
from cli_jax.data.sample import measure
from cli_jax.experiment import SourceConfig
from cli_jax.image.errors import ImageError

TOKENIZER = small.tokenizer()
ROOM = Extent(10_000, 5000, 100, 9, 9000)
SPEC = dataclasses.replace(
    SampleSpec.from_config(small.DATA, small.IMAGE, small.VISION, TOKENIZER), room=ROOM
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    return small.config(small.write(tmp_path, small.mixed_rows(tmp_path, 12)))


@pytest.mark.parametrize(
    "aspect", ["anyres_max_1", "anyres_max_4", "anyres", "square", "pad", "crop"]
)
@pytest.mark.parametrize("multi", ["pad_newline", "same"])
@pytest.mark.parametrize("rounding", ["hf", "original"])
def test_headers_give_the_extents_of_the_samples(tmp_path, aspect, multi, rounding):
    rng = np.random.default_rng(len(aspect) + len(multi))
    image = dataclasses.replace(
        small.IMAGE, aspect_ratio=aspect, multi_image=multi, rounding=rounding
    )
    spec = dataclasses.replace(SPEC, image=image)
    seen = set()
    for i in range(25):
        sizes = rng.integers(1, 60, (rng.integers(0, 4), 2)).tolist()
        names = [small.picture(tmp_path, f"{i}_{j}.png", *size) for j, size in enumerate(sizes)]
        row = small.row(i, "<image>" * len(names) + "Q" * int(rng.integers(9)), image=names)
        try:
            want = make_sample(row, str(tmp_path), spec).extent
        except ImageError as error:  # too elongated for the maximum
            with pytest.raises(ImageError, match=str(error)):
                measure(row, str(tmp_path), spec)
            continue
        assert measure(row, str(tmp_path), spec) == want
        seen.add(want[1:])
    assert len(seen) >= 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff", "ppm"])
def test_formats_and_orientation(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    more = {"exif": exif} if suffix in ("jpg", "png", "webp", "tiff") else {}
    Image.new("RGB", (30, 11)).save(tmp_path / f"a.{suffix}", **more)
    row = small.row(0, image=f"a.{suffix}")
    assert measure(row, str(tmp_path), SPEC) == make_sample(row, str(tmp_path), SPEC).extent


def test_measuring_decodes_no_pixel(tmp_path, monkeypatch):
    small.picture(tmp_path, "a.png", 40, 30)
    row = small.row(0, image="a.png")
    want = make_sample(row, str(tmp_path), SPEC).extent
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])

    def load(self):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert measure(row, str(tmp_path), SPEC) == want


def test_what_is_too_large_or_outside_is_refused_as_in_training(tmp_path):
    small.picture(tmp_path, "a.png", 16, 16)
    (tmp_path / "in").mkdir()
    row = small.row(0, image="a.png")
    with pytest.raises(ImageError, match="leaves the image root"):
        measure(small.row(0, image="../a.png"), str(tmp_path / "in"), SPEC)
    image = dataclasses.replace(small.IMAGE, max_pixels=100)
    with pytest.raises(ImageError, match="max_pixels=100"):
        measure(row, str(tmp_path), dataclasses.replace(SPEC, image=image))
    whole = measure(row, str(tmp_path), SPEC)
    for dimension in Extent._fields:
        room = whole._replace(**{dimension: getattr(whole, dimension) - 1})
        with pytest.raises(TooLong) as caught:
            measure(row, str(tmp_path), dataclasses.replace(SPEC, room=room))
        assert caught.value.dimension == dimension


def test_one_question_is_measured_by_the_longest(tmp_path):
    small.picture(tmp_path, "a.png", 8, 8)
    texts = ["<image>Q", "A", "Q" * 30, "B", "Q", "C" * 7]
    turns = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]
    row = {"id": 0, "image": "a.png", "conversations": turns}
    spec = dataclasses.replace(SPEC, one_question=True)
    drawn = {
        make_sample(row, str(tmp_path), spec, np.random.default_rng(seed)).extent
        for seed in range(20)
    }
    assert len(drawn) == 3
    assert measure(row, str(tmp_path), spec) == max(drawn)
    data = small.config(small.write(tmp_path, [row] * 9), turns="one")
    data, _ = bin_up(data, tmp_path / "bins.npz")
    binned.take(binned.loaders(data), 6)


def members(path):
    bins = load(path)
    return [bins[i] for i in range(len(bins))]


def test_the_file_holds_every_usable_row_once_and_lists_the_others(data, tmp_path):
    rows = json.loads((tmp_path / "train.json").read_text())
    rows += [small.row("none", image="none.png"), small.row("long", "Q" * 300), ["no mapping"]]
    data = small.config(small.write(tmp_path, rows), max_bad_share=0.5)
    data, notes = bin_up(data, tmp_path / "deep" / "bins.npz")
    found = [pair for bin in members(data.bins) for pair in bin]
    assert sorted(found) == [(0, i) for i in range(12)]
    assert (notes["samples"], notes["rows"], notes["left_out"]) == (12, 12, 3)
    listed = left_out_path(data.bins).read_text().splitlines()
    assert [(each["row"], each["kind"]) for each in map(json.loads, listed)] == [
        (12, "image"), (13, "tokens"), (14, "row"),
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")] == []

    extents = [make_sample(row, str(tmp_path), SPEC).extent for row in rows[:12]]
    used = np.sum(extents, 0) / notes["bins"] / (256, 48, 8, 4, 256)
    assert list(notes["fill"].values()) == pytest.approx(used.tolist())
    assert notes["samples_per_update"] == pytest.approx(12 / notes["bins"] * data.batch_size)
    for bin in members(data.bins):
        assert (np.sum([extents[row] for _, row in bin], 0) <= (256, 48, 8, 4, 256)).all()


def test_the_samples_of_a_bin_fit_it_and_fill_it(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 150, 80)
    rows = [small.row(i, "Q" * int(n)) for i, n in enumerate(lengths)]
    data, notes = bin_up(small.config(small.write(tmp_path, rows)), tmp_path / "bins.npz")
    tokens = [make_sample(row, str(tmp_path), SPEC).extent.tokens for row in rows]
    used = [sum(tokens[row] for _, row in bin) for bin in members(data.bins)]
    assert max(used) <= 256
    assert np.mean(used) / 256 == pytest.approx(notes["fill"]["tokens"])
    assert notes["fill"]["tokens"] > 0.95


def test_without_packing_every_sample_has_a_bin_of_its_own(data, tmp_path):
    data, notes = bin_up(dataclasses.replace(data, pack=False), tmp_path / "bins.npz")
    assert sorted(members(data.bins)) == [[(0, i)] for i in range(12)]
    assert notes["samples_per_bin"] == 1
    for batch in binned.take(binned.loaders(data), 4):
        assert (batch["segment_ids"].max(1) == 1).all()


def test_processes_measure_the_same(data, tmp_path, monkeypatch):
    alone, _ = bin_up(data, tmp_path / "a.npz")
    monkeypatch.setattr("cli_jax.data.measure.CHUNK", 5)
    parallel, _ = bin_up(dataclasses.replace(data, workers=2), tmp_path / "b.npz")
    assert members(alone.bins) == members(parallel.bins)
    assert load(alone.bins).fingerprint == load(parallel.bins).fingerprint


def test_weights_decide_how_often_a_source_is_gone_through(tmp_path):
    paths = [small.write(tmp_path, small.mixed_rows(tmp_path, 6, s), f"{s}.json") for s in (0, 50)]
    weights = [SourceConfig(paths[0], weight=1.0, start=2), SourceConfig(paths[1], weight=3.5)]
    data, notes = bin_up(small.config(*weights), tmp_path / "bins.npz")
    found = Counter(pair for bin in members(data.bins) for pair in bin)
    assert {row for source, row in found if source == 0} == {2, 3, 4, 5}
    assert {found[0, row] for row in range(2, 6)} == {1}
    assert sorted(found[1, row] for row in range(6)) == [2, 2, 2, 2, 3, 3]  # 14 = 3.5 x 4
    assert notes["samples"] == 18


def test_unusable_data_stops_it_and_leaves_the_old_file(data, tmp_path):
    data, _ = bin_up(data, tmp_path / "bins.npz")
    before = (tmp_path / "bins.npz").read_bytes()
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    with pytest.raises(DataError, match=r"more than data\.max_bad_share = 0\.01"):
        bin_up(data, tmp_path / "bins.npz")
    long = small.config(data.train[0], row_length=20, max_bad_share=1.0)
    with pytest.raises(DataError, match="none of the first 12 rows drawn can be used"):
        bin_up(long, tmp_path / "bins.npz")
    assert (tmp_path / "bins.npz").read_bytes() == before


CONFIG = """
from configs import common
def get_config():
    config = common.base()
    config.name = "tiny"
    config.data.update(
        train=(common.source("train.json"),), tokenizer={tokenizer!r}, batch_size=2, row_length=256,
        visual_per_row=48, tiles_per_row=8, images_per_row=4,
    )
    config.model.vision.update(image_size=8, patch_size=4)
    config.model.image.update(aspect_ratio="anyres_max_4", grid_pinpoints=((8, 8), (8, 16)))
    return config
"""


def test_the_command_writes_the_file_and_says_how_full_it_is(data, tmp_path):
    TOKENIZER.backend.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(tokenizer=str(tmp_path)))

    def run(*arguments):
        command = [sys.executable, "-m", "cli_jax.data.prepare", "--config", str(config)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )

    out = tmp_path / "bins.npz"
    done = run("--out", str(out), "--config.data.workers=2")
    assert done.returncode == 0, done.stderr
    assert "12 samples in" in done.stdout
    assert "% of the tokens" in done.stdout
    assert "samples per update" in done.stdout
    assert f"--config.data.bins={out}" in done.stdout
    assert "measuring train.json: 100%" in done.stderr
    assert len(members(out)) < 12
    for arguments, message in [
        (["--out", str(out), "--config.data.root=/none"], "error: /none/train.json does not exist"),
        (["--out", str(out), "--config.data.rot=x"], "error: unknown name in a --config flag"),
        (["--out", "/proc/bins.npz"], "error: cannot write --out=/proc/bins.npz"),
    ]:
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(message), done.stderr
