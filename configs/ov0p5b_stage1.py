r"""LLaVA-OneVision-0.5B, stage 1: the projector alone learns to caption, on LCS-558K.

    python convert.py compose ckpt/ov0p5b_start --vision google/siglip-so400m-patch14-384 \
        --language Qwen/Qwen2-0.5B-Instruct --vocab_size 152000
    python train.py --config configs/ov0p5b_stage1.py --workdir runs/ov0p5b_stage1 \
        --config.data.root=DATA --config.init_from=ckpt/ov0p5b_start

DATA holds `blip_laion_cc_sbu_558k.json` and its pictures in `images/`. The workdir is what later
stages start from: --config.init_from=runs/ov0p5b_stage1.

Hardware: 8 GPUs of 80 GB or a TPU v5p-8 is the plan; not measured yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import models, onevision


def get_config() -> ConfigDict:
    config = onevision.stage1(models.qwen2_0p5b())
    config.name = "ov0p5b_stage1"
    config.data.tokenizer = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    return config
