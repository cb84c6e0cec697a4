r"""LLaVA-OneVision-7B with Cross-Layer Injection on a frozen base: only AMP and AGF are trained.

    python train.py --config configs/ov7b_cli_adapter.py --workdir runs/ov7b_cli_adapter \
        --config.data.root=DATA --config.init_from=ckpt/ov7b
    python convert.py to-hf runs/ov7b_cli_adapter out/ov7b_cli_adapter --adapter_only

ckpt/ov7b is any finished LLaVA-OneVision-7B (`convert.py from-hf`); the base has neither gradients
nor optimizer state, and what was trained is shared as a few megabytes. DATA: see ov7b_cli.py.

Hardware: 8 GPUs of 80 GB or a TPU v5p-8 is the plan; not measured yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import common, ov7b_cli


def get_config() -> ConfigDict:
    config = ov7b_cli.get_config()
    config.name = "ov7b_cli_adapter"
    config.optimizer.groups = common.train_only(common.FUSION, lr=1e-4)
    return config
