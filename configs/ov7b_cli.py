r"""LLaVA-OneVision-7B with Cross-Layer Injection: the single-image stage, everything trained.

    python convert.py from-hf lmms-lab/llava-onevision-qwen2-7b-mid-stage-a4 ckpt/ov7b_mid \
        --vocab_size 152128
    python train.py --config configs/ov7b_cli.py --workdir runs/ov7b_cli \
        --config.data.root=DATA --config.init_from=ckpt/ov7b_mid

DATA holds `train.json` in LLaVA's format and the pictures that it names. The recipe is
LLaVA-OneVision's for this stage (configs/onevision.py); CLI's own parameters start new and take the
decoder's learning rate. The gates see the picture only; for gates that also see the question add
--config.fusion.cli.context=prompt --config.data.labels=answer_only.

Hardware: by the dry run (docs/pods.md) an update fits TPU v5e:16x16 (9.1 of 16 GiB), v6e:16x16 and
v5p:4x4x4 (there with --config.optimizer.accumulate=4); nothing was run on them yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import models, onevision


def get_config() -> ConfigDict:
    config = onevision.single_image(models.qwen2_7b())
    config.name = "ov7b_cli"
    config.fusion.name = "cli"
    config.data.tokenizer = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    return config
