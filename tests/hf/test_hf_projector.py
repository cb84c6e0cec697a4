"""A projector of its own width has no Hugging Face format: refused in both directions."""

import dataclasses

import pytest
from hf_models import QWEN, SIGLIP, abstract_params, model_config, source
from hf_workdir import random_params, write_workdir

from cli_jax.hf.error import ConversionError
from cli_jax.hf.load import load_params
from cli_jax.hf.to_hf import to_hf

WIDE = dataclasses.replace(model_config(SIGLIP, QWEN), projector_width=2 * QWEN.hidden_size)
REFUSAL = f"projector_width={2 * QWEN.hidden_size}: .* as wide as the decoder"


def test_no_checkpoint_fits_it(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    with pytest.raises(ConversionError, match=REFUSAL):
        load_params(folder, WIDE, abstract_params(WIDE))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_it_is_not_written(tmp_path, adapter_only):
    workdir = write_workdir(tmp_path / "run", WIDE, random_params(WIDE))
    with pytest.raises(ConversionError, match=REFUSAL):
        to_hf(workdir, tmp_path / "out", adapter_only=adapter_only)
    assert not (tmp_path / "out").exists()


def test_the_decoders_width_spelled_out_is_the_usual_one(tmp_path):
    folder, _, _ = source(tmp_path, SIGLIP, QWEN)
    usual = dataclasses.replace(WIDE, projector_width=QWEN.hidden_size)
    assert load_params(folder, usual, abstract_params(usual)).missing == ()
