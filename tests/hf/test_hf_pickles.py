"""Pickles: refused everywhere, converted in one place, never run."""

import json
import pickle

import numpy as np
import pytest
from hf_models import QWEN, SIGLIP, hub_config, read_all, stored, weights

import convert
from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf
from cli_jax.hf.pickles import bin_to_safetensors
from cli_jax.hf.source import open_source

torch = pytest.importorskip("torch", reason="torch is the other side of this conversion")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_refused_with_one_line_that_names_the_remedy(tmp_path, name, capsys):
    mark = tmp_path / "mark"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(hub_config(SIGLIP, QWEN)))
    (tmp_path / "in" / name).write_bytes(pickle.dumps(Bomb(str(mark))))
    for source in (tmp_path / "in", tmp_path / "in" / name):
        assert convert.main(["from-hf", str(source), str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert f"convert.py bin-to-safetensors {source}" in error
        assert len(error.splitlines()) == 1
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_converted_byte_equal(tmp_path, dtype, legacy):
    tensors = weights(SIGLIP, QWEN, newline=True, dtype=dtype)
    on_disk = {n: as_torch(t) for n, t in stored(tensors, "memory4").items()}
    on_disk["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(9)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(hub_config(SIGLIP, QWEN)))
    items = list(on_disk.items())
    for i, part in enumerate((items[:20], items[20:])):
        torch.save(
            dict(part),
            tmp_path / f"in/pytorch_model-{i + 1:05d}-of-00002.bin",
            _use_new_zipfile_serialization=not legacy,
        )
    torch.save({"step": 3}, tmp_path / "in/training_args.bin")
    left_out = bin_to_safetensors(tmp_path / "in", tmp_path / "raw", max_shard_gb=2e-5)
    assert list(left_out) == ["model.vision_tower.vision_model.embeddings.position_ids"]
    assert len(list((tmp_path / "raw").glob("*.safetensors"))) > 1
    from_hf(tmp_path / "raw", tmp_path / "out")
    found = read_all(tmp_path / "out")
    wanted = stored(tensors, "hub")
    assert set(found) == set(wanted)
    assert all(found[n].tobytes() == wanted[n].tobytes() for n in wanted)


def test_views_and_shared_storage_become_plain_tensors(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"whole": base, "turned": base.T, "part": base[2:5, 1:3], "row": base[1]}
    torch.save(tensors, tmp_path / "x.bin")
    bin_to_safetensors(tmp_path / "x.bin", tmp_path / "out")
    found = read_all(tmp_path / "out")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_code_in_a_pickle_does_not_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"x": torch.ones(2), "bomb": Bomb(str(mark))}, tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Bomb(str(mark))))
    for name in ("x.bin", "y.bin"):
        with pytest.raises(ConversionError, match="refused by torch's safe loader"):
            bin_to_safetensors(tmp_path / name, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_not_a_dictionary_of_tensors(tmp_path):
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "x.bin")
    with pytest.raises(ConversionError, match="not a plain dictionary of tensors"):
        bin_to_safetensors(tmp_path / "x.bin", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"holds no \.bin or \.pt file"):
        bin_to_safetensors(tmp_path / "empty", tmp_path / "out")


def test_safetensors_win_over_pickles_beside_them(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"anything")
    torch.save({"x": torch.ones(2)}, tmp_path / "y.bin")
    bin_to_safetensors(tmp_path / "y.bin", tmp_path / "raw")
    (tmp_path / "in/model.safetensors").write_bytes(
        (tmp_path / "raw/model.safetensors").read_bytes()
    )
    assert list(open_source(tmp_path / "in").tensors) == ["x"]
