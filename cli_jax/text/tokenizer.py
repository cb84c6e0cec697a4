"""Tokenizers: a thin, picklable, thread-safe view of a Hugging Face fast tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli_jax.experiment import ConfigError

# Hugging Face's conversions of LLaVA teach the tokenizer a "<image>" token. The image slot is ours
# (text/encode.py), and in a sample without pictures a literal "<image>" must stay ordinary text, so
# that token keeps its id but loses its name.
_SLOT_NAME, _SLOT_RENAMED = "<image>", "<|unused image slot|>"

# What a bare tokenizer.json does not say, in the order in which it is looked up.
_BOS_NAMES = ("<s>",)
_EOS_NAMES = ("<|im_end|>", "</s>", "<|endoftext|>")
_PAD_NAMES = ("<pad>", "<|endoftext|>", "<unk>")

# Cut into tokens for the fingerprint: spaces, digits, contractions, other scripts, special tokens.
_PROBE = "  Two lines, 12,345 things:\nthey're unlike über 0.5µm <|im_start|> 图像 </s>\n\n"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; special tokens written in the text are recognised, none are added."""

    backend: Any  # tokenizers.Tokenizer: holds no state between calls, so threads may share it
    bos_id: int | None
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without a leading or trailing special token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text` and, per id, the character of `text` at which its token ends."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """The id of one token of the vocabulary; an unknown one is an error."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ConfigError(
                f"the tokenizer has no token {token!r}, which data.template needs; choose another "
                "data.template or data.tokenizer"
            )
        return found

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary and of how a sentence is cut: the same wherever the tokenizer lies."""
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        known = json.dumps([vocabulary, self.encode(_PROBE), self.bos_id])
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    @property
    def max_id(self) -> int:
        """The largest id that `encode` can return."""
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return max(i for token, i in vocabulary.items() if token != _SLOT_RENAMED)


def load_tokenizer(source: str) -> Tokenizer:
    """Loads the tokenizer of a folder or hub id; a folder with only `tokenizer.json` will do.

    A folder is read without network access. Nothing is unpickled and no remote code is run.
    Raises ConfigError when there is no such tokenizer or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow: workers never need it

    folder = Path(source).expanduser()
    try:
        if not source:
            raise OSError("no folder or hub id is given")
        if not folder.is_dir():
            if folder.is_absolute() or source.startswith((".", "~")):
                raise OSError("no such folder")
            loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        elif (folder / "tokenizer_config.json").is_file():
            loaded = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        elif (folder / "tokenizer.json").is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        else:
            raise OSError("the folder holds neither tokenizer_config.json nor tokenizer.json")
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception too
        raise ConfigError(
            f"cannot load data.tokenizer = {source!r}: {error}; give a folder with a "
            "tokenizer.json or a hub id"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"data.tokenizer = {source!r} has no fast (tokenizer.json) form; convert it first"
        )
    return from_backend(
        backend, bos=loaded.bos_token, eos=loaded.eos_token, pad=loaded.pad_token, name=source
    )


def from_backend(
    backend: Any,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    name: str = "tokenizer",
) -> Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; tokens that are not named are looked up by usual names."""
    backend = _without_slot_token(backend)

    def first(named: str | None, usual: Sequence[str]) -> int | None:
        names = (named,) if named is not None else usual
        ids = [backend.token_to_id(n) for n in names]
        return next((i for i in ids if i is not None), None)

    eos_id = first(eos, _EOS_NAMES)
    if eos_id is None:
        raise ConfigError(
            f"{name} has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    pad_id = first(pad, _PAD_NAMES)
    return Tokenizer(backend, first(bos, _BOS_NAMES), eos_id, eos_id if pad_id is None else pad_id)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ConfigError if the tokenizer can return ids that the model has no embedding for."""
    if tokenizer.max_id >= vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {tokenizer.max_id}, but config.model.text.vocab_size is "
            f"{vocab_size}; use the model's own tokenizer (config.data.tokenizer) or raise it"
        )


def _without_slot_token(backend: Any) -> Any:
    """The backend with its added "<image>" token renamed, ids unchanged; others as they are."""
    spec = json.loads(backend.to_str())
    slots = [token for token in spec["added_tokens"] if token["content"] == _SLOT_NAME]
    if not slots:
        return backend
    for token in slots:
        token["content"] = _SLOT_RENAMED
    vocabulary = spec["model"].get("vocab", {})
    if isinstance(vocabulary, dict) and _SLOT_NAME in vocabulary:
        vocabulary[_SLOT_RENAMED] = vocabulary.pop(_SLOT_NAME)
    renamed = type(backend).from_str(json.dumps(spec))
    ids = renamed.get_vocab(with_added_tokens=True)
    ids[_SLOT_NAME] = ids.pop(_SLOT_RENAMED, None)
    if ids != backend.get_vocab(with_added_tokens=True):
        raise ConfigError(
            f"the tokenizer's {_SLOT_NAME} token cannot be turned off without moving other ids; "
            "delete it from tokenizer.json"
        )
    return renamed
