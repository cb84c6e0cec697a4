r"""LLaVA-1.5-7B with Cross-Layer Injection: visual instruction tuning, vision tower frozen.

    python train.py --config configs/llava15_7b_cli.py --workdir runs/llava15_7b_cli \
        --config.data.root=DATA --config.init_from=runs/llava15_7b_stage1

DATA holds `llava_v1_5_mix665k.json` and the folders of pictures that it names (coco/, gqa/, ...).
The recipe is LLaVA-1.5's (configs/llava15.py); CLI's own parameters start new and take the
decoder's learning rate.

Hardware: by the dry run (docs/pods.md) an update fits the 8 chips of TPU v5p:2x2x2 (28.1 of 95
GiB); nothing was run on them yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import llava15, models


def get_config() -> ConfigDict:
    config = llava15.finetune(models.vicuna_7b())
    config.name = "llava15_7b_cli"
    config.fusion.name = "cli"
    config.data.tokenizer = "llava-hf/llava-1.5-7b-hf"
    return config
