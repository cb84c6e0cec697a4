r"""LLaVA-1.5-7B with DPVR-LF on a frozen base: only the side branch is trained.

    python train.py --config configs/llava15_7b_dpvr.py --workdir runs/llava15_7b_dpvr \
        --config.data.root=DATA --config.init_from=ckpt/llava15_7b
    python convert.py to-hf runs/llava15_7b_dpvr out/llava15_7b_dpvr --adapter_only

ckpt/llava15_7b is a finished LLaVA-1.5-7B (`convert.py from-hf llava-hf/llava-1.5-7b-hf`). From
decoder layer 18 on, vision tokens leave the stack for a trained layer of their own, a copy of layer
18 at the start; they come back in layer 31 (docs/method.md section 3). DATA: see llava15_7b_cli.py.
A row holds at most 2,048 text tokens, as many as a sample of the recipe may have. The learning rate
is a guess.

Hardware: by the dry run an update fits the 8 chips of TPU v5p:2x2x2 (15.0 of 95 GiB);
nothing was run on them yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import common, llava15_7b_baseline


def get_config() -> ConfigDict:
    config = llava15_7b_baseline.get_config()
    config.name = "llava15_7b_dpvr"
    config.routing.update(name="dpvr", saturation=18)
    config.data.text_per_row = 2048
    config.optimizer.groups = common.train_only(common.ROUTING, lr=1e-4)
    return config
