r"""LLaVA-1.5-7B, stage 1: the projector alone learns to caption, on LCS-558K.

    python convert.py compose ckpt/llava15_start --vision openai/clip-vit-large-patch14-336 \
        --language lmsys/vicuna-7b-v1.5 --vocab_size 32064
    python train.py --config configs/llava15_7b_stage1.py --workdir runs/llava15_7b_stage1 \
        --config.data.root=DATA --config.init_from=ckpt/llava15_start

DATA holds `blip_laion_cc_sbu_558k.json` and its pictures in `images/`.

Hardware: 8 GPUs of 80 GB or a TPU v5p-8 is the plan; not measured yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import llava15, models


def get_config() -> ConfigDict:
    config = llava15.stage1(models.vicuna_7b())
    config.name = "llava15_7b_stage1"
    config.data.tokenizer = "llava-hf/llava-1.5-7b-hf"
    return config
