r"""LLaVA-OneVision-0.5B with Cross-Layer Injection: the single-image stage, everything trained.

    python convert.py from-hf lmms-lab/llava-onevision-qwen2-0.5b-mid-stage-a4 ckpt/ov0p5b_mid \
        --vocab_size 152000
    python train.py --config configs/ov0p5b_cli.py --workdir runs/ov0p5b_cli \
        --config.data.root=DATA --config.init_from=ckpt/ov0p5b_mid

DATA holds `train.json` in LLaVA's format and the pictures that it names. The recipe is
LLaVA-OneVision's for this stage (configs/onevision.py); CLI's own parameters start new and take the
decoder's learning rate. The gates see the picture only; for gates that also see the question add
--config.fusion.cli.context=prompt --config.data.labels=answer_only.

Hardware: by the dry run (docs/pods.md) an update fits the 8 chips of TPU v5e:2x4 (9.1 of 16 GiB);
nothing was run on them yet.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import models, onevision


def get_config() -> ConfigDict:
    config = onevision.single_image(models.qwen2_0p5b())
    config.name = "ov0p5b_cli"
    config.fusion.name = "cli"
    config.optimizer.accumulate = 32  # one row per device at a time on 8 devices: 16 GiB are enough
    config.data.tokenizer = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    return config
