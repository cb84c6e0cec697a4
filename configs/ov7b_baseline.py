r"""LLaVA-OneVision-7B without injection: what ov7b_cli.py is compared with, all else equal.

    python train.py --config configs/ov7b_baseline.py --workdir runs/ov7b_baseline \
        --config.data.root=DATA --config.init_from=ckpt/ov7b_mid

DATA and ckpt/ov7b_mid: see ov7b_cli.py.

Hardware: as ov7b_cli.py.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import ov7b_cli


def get_config() -> ConfigDict:
    config = ov7b_cli.get_config()
    config.name = "ov7b_baseline"
    config.fusion.name = "none"
    return config
