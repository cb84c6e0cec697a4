"""The demo's tokenizer: what is committed is what is built, words are tokens, nothing is lost."""

import json
import subprocess
import sys

import pytest

from cli_jax.demo import TOKENIZER, vocabulary
from cli_jax.text import check_vocabulary, load_tokenizer, stop_ids


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TOKENIZER))


def test_the_committed_file_is_what_build_gives():
    committed = json.loads((TOKENIZER / "tokenizer.json").read_text())
    assert json.loads(vocabulary.build().to_str()) == committed


def test_the_build_does_not_depend_on_the_process():
    code = "from cli_jax.demo import vocabulary; print(vocabulary.build().to_str())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == json.loads(vocabulary.build().to_str())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("What is the digit at the top left?", 9),
        ("How many 3s are there?", 8),
        ("How many yellow objects are in the middle box?\nAnswer with a single number.", 16),
        ("What is the fifth digit from the left?\nAnswer with a single number.", 15),
        ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", 11),
        ("27009", 5),
    ],
)
def test_words_and_digits_are_tokens(tokenizer, text, tokens):
    assert len(tokenizer.encode(text)) == tokens


def test_any_ascii_text_survives(tokenizer):
    text = "".join(map(chr, [9, 10, 13, *range(32, 127)])) + " Zebra-crossing 2026 \n\n\tx"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_characters_become_the_unknown_token(tokenizer):
    unknown = tokenizer.id_of(vocabulary.UNKNOWN)
    assert tokenizer.encode("é") == [unknown, unknown]  # its two bytes
    assert unknown not in tokenizer.encode("e")


def test_special_tokens_of_the_template(tokenizer):
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.id_of(name) for name in names] == [0, 1, 2]
    assert tokenizer.encode("<|im_start|>user\n")[0] == 1
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    assert set(stop_ids(tokenizer, "qwen_1_5")) >= {2}


def test_size(tokenizer):
    check_vocabulary(tokenizer, 320)
    assert tokenizer.max_id >= 256
