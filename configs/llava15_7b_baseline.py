r"""LLaVA-1.5-7B without injection: what llava15_7b_cli.py is compared with, all else equal.

    python train.py --config configs/llava15_7b_baseline.py --workdir runs/llava15_7b_baseline \
        --config.data.root=DATA --config.init_from=runs/llava15_7b_stage1

DATA: see llava15_7b_cli.py.

Hardware: as llava15_7b_cli.py.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import llava15_7b_cli


def get_config() -> ConfigDict:
    config = llava15_7b_cli.get_config()
    config.name = "llava15_7b_baseline"
    config.fusion.name = "none"
    return config
