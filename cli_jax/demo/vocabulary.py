"""The small tokenizer of the demo configs: byte-pair encoding in which every known word is a token.

    python -m cli_jax.demo.vocabulary        writes cli_jax/demo/tokenizer/tokenizer.json anew

It is trained on the words below until nothing is left to merge, so that questions about digits,
shapes and meters are a token per word. Any other ASCII text is spelled out; a character outside of
ASCII becomes `<|unknown|>`. Digits are never merged: a number is as many tokens as it has digits.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "tokenizer"

UNKNOWN = "<|unknown|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", UNKNOWN)
ALPHABET = "\t\n\r" + "".join(map(chr, range(32, 127)))

# The chat template, the demo's own questions, and those of two sets of the same kind: how many
# objects of a color, shape or size are in a box, and which digits a meter shows.
TEXT = """\
system
user
assistant
You are a helpful assistant.
What is the digit at the top left? What is the digit at the bottom right? The center, the middle.
Which digit is there? Where is the 3? Which row? Which column?
How many 3s are there? How many digits are there?
How many objects are in the left box?
How many black objects are in the middle box? blue yellow red green
How many small medium large objects are in the right box?
How many circles squares triangles are in the left box?
What is the first second third fourth fifth digit from the left?
What is the full reading?
Answer with a single number.
Answer with a single word.
yes no zero one two three
"""

# Qwen2's split: words with their leading space, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build() -> Tokenizer:
    """Trains the tokenizer on `TEXT`; the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # never reached: merging ends when every word is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=[byte_level.pre_tokenize_str(c)[0][0] for c in ALPHABET],
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    build().save(str(FOLDER / "tokenizer.json"))


if __name__ == "__main__":
    main()
