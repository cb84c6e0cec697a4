"""Our safetensors reader and writer against the library's."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cli_jax.hf.error import ConversionError
from cli_jax.hf.tensorfile import read_header, write_file

TENSORS = {
    "half": np.arange(15, dtype=np.float16).reshape(3, 5),  # 30 bytes: the next would be unaligned
    "full": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 2, 3),
    "brain": np.arange(7).astype(ml_dtypes.bfloat16),
}


def test_library_reads_what_is_written_in_blocks(tmp_path):
    file = tmp_path / "x.safetensors"
    write_file(file, [(n, t.shape, t.dtype, (t[:1], t[1:])) for n, t in TENSORS.items()])
    found = load_file(file)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_written_tensors_are_aligned(tmp_path):
    file = tmp_path / "x.safetensors"
    write_file(file, [(n, t.shape, t.dtype, (t,)) for n, t in TENSORS.items()])
    for tensor in read_header(file).values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_rows_of_what_the_library_wrote(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    header = read_header(file)
    for name, tensor in TENSORS.items():
        assert (header[name].shape, header[name].dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(header[name].read(1, 3), tensor[1:3])
        np.testing.assert_array_equal(header[name].read(0, len(tensor)), tensor)


def test_unknown_dtype_is_refused_only_when_it_is_needed(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"ids": np.arange(4), "x": np.zeros(2, np.float32)}, file)
    header = read_header(file)
    assert header["x"].dtype == np.float32
    with pytest.raises(ConversionError, match=r"ids in .*x.safetensors has dtype I64"):
        _ = header["ids"].dtype


def test_short_and_foreign_files_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(TENSORS, file)
    whole = file.read_bytes()
    for size in (0, 5, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ConversionError, match="cut short"):
            read_header(file)
    file.write_bytes(struct.pack("<Q", 4) + b"nope" + b"0" * 100)
    with pytest.raises(ConversionError, match="broken safetensors header"):
        read_header(file)
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 8)
    with pytest.raises(ConversionError, match="gives x a wrong size"):
        read_header(file)


def test_a_block_too_few_is_noticed(tmp_path):
    tensor = TENSORS["full"]
    with pytest.raises(AssertionError, match="bytes written"):
        write_file(tmp_path / "x", [("x", tensor.shape, tensor.dtype, (tensor[:2],))])
