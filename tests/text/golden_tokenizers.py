"""Tokenizers whose vocabularies hold exactly the pieces of the golden sequences, with their ids."""

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cli_jax.text.tokenizer import Tokenizer, from_backend

QWEN_PIECES = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
    "system": 8948, "\n": 198, "\n\n": 271, "You": 2610, " are": 525, " a": 264,
    " helpful": 10950, " assistant": 17847, ".": 13, "user": 872, "assistant": 77091,
    "What": 3838, " is": 374, " this": 419, "?": 30, "A": 32, " cat": 8251, "Why": 10234,
    " dog": 5562, "<": 27, "image": 1805, ">": 29, " ": 220, "<unk>": 0,
}  # fmt: skip
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# "▁" stands for a space; a piece of v1 is cut by the alternatives below, in their order.
V1_PIECES = {
    "<unk>": 0, "<s>": 1, "</s>": 2, "▁A": 319, "▁chat": 13563, "▁between": 1546, "▁a": 263,
    "▁curious": 12758, "▁user": 1404, "▁and": 322, "▁an": 385, "▁artificial": 23116,
    "▁intelligence": 21082, "▁assistant": 20255, ".": 29889, "▁The": 450, "▁gives": 4076,
    "▁helpful": 8444, ",": 29892, "▁detailed": 13173, "▁pol": 1248, "ite": 568, "▁answers": 6089,
    "▁to": 304, "▁the": 278, "'": 29915, "s": 29879, "▁questions": 5155, "▁US": 3148,
    "ER": 1001, ":": 29901, "▁": 29871, "SS": 1799, "IST": 9047, "ANT": 13566, "USER": 11889,
    "\n": 13, "What": 5618, "▁is": 338, "▁this": 445, "?": 29973, "▁cat": 6635, "▁Why": 3750,
    "▁dog": 11203, "▁What": 1724, "Why": 11008, "<": 29966, "image": 3027, ">": 29958,
}  # fmt: skip
V1_CUTS = "▁A(?=SSIST)|SS(?=IST)|IST|ANT|▁US(?=ER)|USER|ER|▁pol(?=ite)|ite|▁?[A-Za-z]+|[^A-Za-z]"


def qwen_backend() -> Backend:
    backend = Backend(models.WordLevel(QWEN_PIECES, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+| ?[A-Za-z]+|[^\nA-Za-z]"), "isolated")
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in QWEN_SPECIALS])
    backend.decoder = decoders.Fuse()
    return backend


def qwen() -> Tokenizer:
    return from_backend(qwen_backend(), eos="<|im_end|>", pad="<|endoftext|>")


def v1_backend() -> Backend:
    backend = Backend(models.WordLevel(V1_PIECES, unk_token="<unk>"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Like the references' slow tokenizer with legacy=False: a leading space at the start
            # of every text that is tokenized, none after a special token.
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(V1_CUTS), "isolated"),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    return backend


def v1() -> Tokenizer:
    return from_backend(v1_backend(), bos="<s>", eos="</s>", pad="<unk>")
