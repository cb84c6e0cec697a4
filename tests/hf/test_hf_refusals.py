"""Tied heads and vocabulary rows, and what is refused."""

import json

import huggingface_hub
import numpy as np
import pytest
from hf_models import QWEN, QWEN_UNTIED, SIGLIP, read_all, same, source, stored
from safetensors.numpy import save_file

from cli_jax.hf.error import ConversionError
from cli_jax.hf.from_hf import from_hf


class TestTiedHead:
    def head(self, tmp_path, change=0.0, text=QWEN):
        folder, tensors, _ = source(tmp_path, SIGLIP, text)
        head = tensors["language_model.embed_tokens.weight"].copy()
        head[7, 3] += change
        on_disk = stored(tensors, "hub") | {"language_model.lm_head.weight": head}
        save_file(on_disk, folder / "model.safetensors")
        return folder

    def test_a_stored_copy_is_dropped(self, tmp_path):
        report = from_hf(self.head(tmp_path), tmp_path / "out")
        assert "language_model.lm_head.weight" not in read_all(tmp_path / "out")
        assert any("equals the tied embedding" in note for note in report["notes"])

    def test_another_head_is_an_error(self, tmp_path):
        with pytest.raises(ConversionError, match="differs from the embedding"):
            from_hf(self.head(tmp_path, change=1e-3), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_untied_head_stays(self, tmp_path):
        from_hf(self.head(tmp_path, text=QWEN_UNTIED), tmp_path / "out")
        assert "language_model.lm_head.weight" in read_all(tmp_path / "out")

    def test_untied_without_a_head_is_an_error(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match=r"missing lm_head.weight: expected \[96, 32\]"):
            from_hf(folder, tmp_path / "out")


class TestVocabulary:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rows_are_appended_only_when_asked(self, tmp_path, dtype):
        folder, tensors, _ = source(tmp_path, SIGLIP, QWEN_UNTIED, dtype=dtype)
        report = from_hf(folder, tmp_path / "out", vocab_size=128)
        found = read_all(tmp_path / "out")
        for name in ("language_model.embed_tokens.weight", "lm_head.weight"):
            old = tensors[name]
            new = found[
                {"lm_head.weight": "language_model.lm_head.weight"}.get(
                    name, "language_model.model.embed_tokens.weight"
                )
            ]
            assert same(new[:96], old)
            mean = old.astype(np.float64).mean(axis=0).astype(old.dtype)
            assert same(new[96:], np.repeat(mean[None], 32, axis=0))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["text_config"]["vocab_size"] == 128
        assert sum("32 rows appended" in note for note in report["notes"]) == 2

    def test_an_appended_token_is_never_the_likeliest(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        from_hf(folder, tmp_path / "out", vocab_size=97)
        head = read_all(tmp_path / "out")["language_model.model.embed_tokens.weight"]
        hidden = np.random.default_rng(0).standard_normal((1000, 32))
        assert (np.argmax(hidden @ head.T, axis=-1) < 96).all()

    def test_rows_are_never_taken_away(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        with pytest.raises(ConversionError, match=r"expected \[90, 32\], found \[96, 32\]"):
            from_hf(folder, tmp_path / "out", vocab_size=90)


class TestRefusals:
    def test_one_error_lists_everything(self, tmp_path):
        folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
        on_disk = stored(tensors, "hub")
        del on_disk["language_model.model.norm.weight"]
        key = "language_model.model.layers.1.self_attn.k_proj.weight"
        on_disk[key] = np.ascontiguousarray(on_disk[key].T)  # a kernel left transposed
        del on_disk["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias"]
        on_disk["language_model.model.layers.2.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
        save_file(on_disk, folder / "model.safetensors")
        with pytest.raises(ConversionError) as error:
            from_hf(folder, tmp_path / "out")
        lines = str(error.value).splitlines()
        assert "4 differences" in lines[0]
        assert {line.strip() for line in lines[1:5]} == {
            "missing language_model.norm.weight: expected [32]",
            "missing vision_tower.encoder.layers.0.self_attn.q_proj.bias: expected [24]",
            "wrong   language_model.layers.1.self_attn.k_proj.weight: expected [16, 32],"
            " found [32, 16]",
            "extra   language_model.layers.2.mlp.up_proj.weight: found [48, 32]",
        }
        assert not list(tmp_path.glob("out*"))

    def test_the_same_tensor_under_two_names(self, tmp_path):
        folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
        on_disk = stored(tensors, "hub")
        on_disk["model.image_newline"] = on_disk["image_newline"]
        save_file(on_disk, folder / "model.safetensors")
        with pytest.raises(ConversionError, match="are both image_newline"):
            from_hf(folder, tmp_path / "out")

    def test_a_missing_shard(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN, shards=3)
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(ConversionError, match="names model-00002-of-00003"):
            from_hf(folder, tmp_path / "out")

    def test_an_index_that_promises_too_much_or_leads_elsewhere(self, tmp_path):
        folder, _, _ = source(tmp_path, SIGLIP, QWEN, shards=2)
        index_file = folder / "model.safetensors.index.json"
        index = json.loads(index_file.read_text())
        index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
        index_file.write_text(json.dumps(index))
        with pytest.raises(ConversionError, match="no file holds: ghost"):
            from_hf(folder, tmp_path / "out")
        index["weight_map"]["ghost"] = "../elsewhere.safetensors"
        index_file.write_text(json.dumps(index))
        save_file({"ghost": np.ones(1, np.float32)}, tmp_path / "elsewhere.safetensors")
        with pytest.raises(ConversionError, match="which is not in"):
            from_hf(folder, tmp_path / "out")

    def test_a_local_path_never_reaches_the_hub(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("network")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        folder, _, _ = source(tmp_path, SIGLIP, QWEN)
        from_hf(folder, tmp_path / "out")
        with pytest.raises(ConversionError, match="does not exist"):
            from_hf(tmp_path / "nothing", tmp_path / "out2")

    def test_a_hub_id_fetches_no_pickles(self, tmp_path, monkeypatch):
        folder, tensors, _ = source(tmp_path, SIGLIP, QWEN)
        asked = {}

        def fetch(repo, allow_patterns):
            asked[repo] = allow_patterns
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
        from_hf("someone/some-model", tmp_path / "out")
        assert len(read_all(tmp_path / "out")) == len(tensors)
        (patterns,) = asked.values()
        assert not any(p.endswith((".bin", ".pt", "*")) for p in patterns)

    def test_an_unreachable_hub_is_one_line(self, tmp_path, monkeypatch):
        def fail(repo, allow_patterns):
            raise OSError("no route\nto host")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ConversionError) as error:
            from_hf("someone/some-model", tmp_path / "out")
        assert len(str(error.value).splitlines()) == 1
