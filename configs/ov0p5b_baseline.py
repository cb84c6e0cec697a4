r"""LLaVA-OneVision-0.5B without injection: what ov0p5b_cli.py is compared with, all else equal.

    python train.py --config configs/ov0p5b_baseline.py --workdir runs/ov0p5b_baseline \
        --config.data.root=DATA --config.init_from=ckpt/ov0p5b_mid

DATA and ckpt/ov0p5b_mid: see ov0p5b_cli.py.

Hardware: as ov0p5b_cli.py.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import ov0p5b_cli


def get_config() -> ConfigDict:
    config = ov0p5b_cli.get_config()
    config.name = "ov0p5b_baseline"
    config.fusion.name = "none"
    return config
