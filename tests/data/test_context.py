"""The `prompt` gate context refuses labels between a picture and its answer, and nothing else."""

import dataclasses

import pytest
import small

from cli_jax.data import SampleSpec, Sizes, check_prompt_context, collate, make_sample
from cli_jax.experiment import ConfigError

TOKENIZER = small.tokenizer()
SIZES = Sizes.from_config(small.DATA, small.VISION, 2)


def sample(folder, labels, image=True):
    spec = SampleSpec.from_config(small.DATA, small.IMAGE, small.VISION, TOKENIZER)
    spec = dataclasses.replace(spec, labels=labels)
    name = small.picture(folder, "a.png", 8, 8) if image else None
    row = small.row(3, "<image>\nQ", "A", name)
    row["conversations"] = [*row["conversations"], *small.row(0, "R", "B")["conversations"]]
    return make_sample(row, str(folder), spec)


def test_reference_labels_are_refused_and_name_the_remedy(tmp_path):
    one = sample(tmp_path, "reference")
    with pytest.raises(ConfigError, match=r"sample r3 .*set data.labels=answer_only"):
        check_prompt_context(one)
    sound = sample(tmp_path, "answer_only")
    with pytest.raises(ConfigError, match=r"sample of row 1 .*answer_only"):
        check_prompt_context(collate([[sound], [sound, one]], SIZES))


def test_answer_only_labels_and_text_pass(tmp_path):
    sound, text = sample(tmp_path, "answer_only"), sample(tmp_path, "reference", image=False)
    check_prompt_context(sound)
    check_prompt_context(text)
    batch = collate([[sound, text], [text, sound]], SIZES)
    check_prompt_context(batch)
    end = batch["context_end"][1, 0]
    first = batch["visual_position"][1].max(where=batch["visual_image"][1] == 0, initial=0) + 1
    for at in (first, end - 1):  # right behind the picture; the last token before the answer
        labels = batch["labels"].copy()
        labels[1, at] = 1
        with pytest.raises(ConfigError, match="of row 1"):
            check_prompt_context({**batch, "labels": labels})
    batch["labels"][1, [first - 1, end]] = 1
    check_prompt_context(batch)
