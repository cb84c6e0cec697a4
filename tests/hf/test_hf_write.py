"""Outputs appear whole or not at all, and nothing that exists is touched."""

import collections
import errno
import shutil

import numpy as np
import pytest
from hf_models import QWEN, SIGLIP, source

from cli_jax.hf import write
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.tensor import PaddedVocabulary, fingerprint
from cli_jax.hf.write import output_folder


class Memory:
    """A numpy array as a Tensor."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, start, stop):
        return self.array[start:stop]


def test_an_existing_output_is_untouched(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("1")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        from_hf(folder, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "file").write_text("2")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        from_hf(folder, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "2"


def test_an_empty_folder_is_filled(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    (tmp_path / "out").mkdir()
    from_hf(folder, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_leftover_is_named_and_kept(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/half").write_text("1")
    with pytest.raises(ConversionError, match=r"out\.tmp is left from a conversion"):
        from_hf(folder, tmp_path / "out")
    assert (tmp_path / "out.tmp/half").is_file()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_what_fails_halfway_leaves_nothing(tmp_path, monkeypatch, error):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    calls = []

    def fail(path, streams):
        calls.append(path)
        path.write_bytes(b"some")
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(write, "write_file", fail)
    wanted = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ConversionError
    with pytest.raises(wanted, match="" if wanted is KeyboardInterrupt else "No space left"):
        from_hf(folder, tmp_path / "out", max_shard_gb=2e-5)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_disk_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ConversionError, match=r"GB free, the output needs"):
        from_hf(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConversionError, match="cannot be written"),
        output_folder(tmp_path / "file/x"),
    ):
        pass


TENSORS = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(5, np.float32)}


class TestFingerprint:
    def of(self, **changes):
        return fingerprint({n: Memory(t) for n, t in {**TENSORS, **changes}.items()})

    def test_neither_order_nor_dtype_nor_blocks_matter(self, monkeypatch):
        first = self.of()
        assert first == self.of(a=TENSORS["a"].astype(np.float16))
        backwards = {n: Memory(TENSORS[n]) for n in ("b", "a")}
        assert first == fingerprint(backwards)
        monkeypatch.setattr("cli_jax.hf.tensor.BLOCK_BYTES", 12)
        assert first == self.of()

    def test_everything_else_does(self):
        a = TENSORS["a"]
        swapped = a.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        tiny = a.copy()
        tiny[3, 2] = np.nextafter(tiny[3, 2], np.float32(99))
        minus = a.copy()
        minus[0, 0] = -0.0
        found = {
            self.of(),
            self.of(a=swapped),
            self.of(a=tiny),
            self.of(a=minus),
            self.of(a=a.reshape(3, 4)),
            self.of(c=a),
            fingerprint({"a": Memory(TENSORS["b"]), "b": Memory(a)}),
        }
        assert len(found) == 7


def test_padded_rows_in_any_piece(monkeypatch):
    monkeypatch.setattr("cli_jax.hf.tensor.BLOCK_BYTES", 8)
    table = np.random.default_rng(0).standard_normal((5, 3), np.float32)
    padded = PaddedVocabulary(Memory(table), 9)
    mean = np.repeat(table.mean(0, dtype=np.float64).astype(np.float32)[None], 4, 0)
    whole = np.concatenate([table, mean])
    for start in range(9):
        for stop in range(start + 1, 10):
            np.testing.assert_array_equal(padded.read(start, stop), whole[start:stop])
