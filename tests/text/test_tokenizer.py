"""Loading tokenizers: folders of both kinds, their special tokens, and what is refused."""

import concurrent.futures
import contextlib
import json
import pickle

import golden_tokenizers as golden
import pytest
from transformers import PreTrainedTokenizerFast

from cli_jax.experiment import ConfigError
from cli_jax.text import check_vocabulary, load_tokenizer

TEXT = "<|im_start|>user\nWhat is this?<|im_end|>\n"
IDS = [151644, 872, 198, 3838, 374, 419, 30, 151645, 198]


@pytest.fixture
def bare(tmp_path):
    golden.qwen_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_bare_tokenizer_json_is_enough(bare):
    tokenizer = load_tokenizer(str(bare))
    assert tokenizer.encode(TEXT) == IDS
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 151645, 151643)
    assert tokenizer.decode(IDS) == "user\nWhat is this?\n"


def test_a_saved_tokenizer_keeps_its_special_tokens(tmp_path):
    PreTrainedTokenizerFast(
        tokenizer_object=golden.v1_backend(), bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.encode("USER:") == [3148, 1001, 29901]  # no <s> in front
    assert tokenizer.encode("A</s>USER:") == [319, 2, 11889, 29901]


def test_character_ends_cut_the_text_at_tokens():
    ids, ends = golden.qwen().encode_with_ends("What is this?")
    assert ids == [3838, 374, 419, 30]
    assert ends == [4, 7, 12, 13]


def dense_backend():
    """A vocabulary without holes, in which added tokens keep their ids when it is read back."""
    backend = golden.qwen_backend()
    spec = json.loads(backend.to_str())
    vocabulary = {token: i for i, token in enumerate(spec["model"]["vocab"])}
    for token in spec["added_tokens"]:
        token["id"] = vocabulary[token["content"]]
    spec["model"]["vocab"] = vocabulary
    return type(backend).from_str(json.dumps(spec))


def test_an_image_token_of_the_tokenizer_becomes_text_and_no_id_moves():
    backend = dense_backend()
    backend.add_special_tokens(["<image>", "<pad>"])
    image, pad = backend.token_to_id("<image>"), backend.token_to_id("<pad>")
    assert backend.encode("<image>").ids == [image]
    tokenizer = golden.from_backend(backend)
    assert tokenizer.encode("<image>") == [tokenizer.id_of(p) for p in ("<", "image", ">")]
    assert tokenizer.id_of("<pad>") == tokenizer.pad_id == pad
    assert tokenizer.encode(TEXT) == backend.encode(TEXT).ids
    assert tokenizer.max_id == pad  # the unused slot does not count
    with pytest.raises(ConfigError, match="no token '<image>'"):
        tokenizer.id_of("<image>")


def test_an_image_token_that_cannot_be_renamed_is_refused():
    backend = golden.qwen_backend()  # holes in its ids: reading it back would move <video>
    backend.add_special_tokens(["<image>", "<video>"])
    with pytest.raises(ConfigError, match="without moving other ids"):
        golden.from_backend(backend)


def test_ids_must_fit_the_embedding():
    tokenizer = golden.qwen()
    check_vocabulary(tokenizer, 151646)
    with pytest.raises(ConfigError, match=r"up to 151645.*vocab_size is 151645"):
        check_vocabulary(tokenizer, 151645)


def test_what_cannot_be_loaded_is_named(tmp_path, bare):
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither tokenizer_config.json nor tokenizer.json"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="no folder or hub id"):
        load_tokenizer("")
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot load data\.tokenizer"):
        load_tokenizer(str(bare))


def test_remote_code_is_not_run(bare):
    marker = bare / "ran"
    (bare / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (bare / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    with contextlib.suppress(ConfigError):  # refusing it is as good as ignoring its code
        load_tokenizer(str(bare))
    assert not marker.exists()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    spec = json.loads(golden.qwen_backend().to_str())
    text = json.dumps(spec).replace("<|im_end|>", "<|a|>").replace("<|endoftext|>", "<|b|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="end-of-sequence"):
        load_tokenizer(str(tmp_path))


def test_a_template_names_the_token_it_lacks():
    with pytest.raises(ConfigError, match=r"no token '</s>'.*data.template"):
        golden.qwen().id_of("</s>")


def test_it_travels_to_workers_and_serves_threads():
    tokenizer = pickle.loads(pickle.dumps(golden.qwen()))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(ids == IDS for ids in pool.map(tokenizer.encode, [TEXT] * 200))
