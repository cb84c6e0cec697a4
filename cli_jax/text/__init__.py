"""From conversations to token ids: tokenizers, chat templates, label masks. No jax here."""

from cli_jax.text.conversation import ConversationError
from cli_jax.text.encode import (
    IMAGE,
    Encoded,
    encode_conversation,
    encode_history,
    encode_prompt,
    stop_ids,
)
from cli_jax.text.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "IMAGE",
    "ConversationError",
    "Encoded",
    "Tokenizer",
    "check_vocabulary",
    "encode_conversation",
    "encode_history",
    "encode_prompt",
    "load_tokenizer",
    "stop_ids",
]
