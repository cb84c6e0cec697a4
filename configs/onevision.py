"""LLaVA-OneVision's recipes: what its three kinds of runs share, whatever the decoder.

Sizes: a picture has at most 8,829 tokens and 37 tiles, so a row of 10,240 tokens holds every
picture with 1,400 tokens of text, or one or two samples of the usual 4,000 to 7,000 tokens. Visual
slots for the largest picture alone would run out before the tokens do (benchmarks/fill.py). An
update of 256 rows is therefore 256 samples or more, up to about 400; the reference's is 256.
docs/pods.md says on which TPUs that fits.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, models


def single_image(text: dict[str, Any]) -> ConfigDict:
    """The single-image stage: everything is trained, the vision tower at a fifth of the rate."""
    config = common.base()
    common.set_model(config, models.siglip_so400m_384(), text, models.onevision_images())
    config.data.update(
        train=(common.source("train.json"),),
        template="qwen_1_5",
        labels="reference",
        batch_size=256,
        row_length=10_240,
        visual_per_row=9728,
        tiles_per_row=37,
        images_per_row=16,
        workers=16,
    )
    config.optimizer.update(
        lr=1e-5,
        groups=(common.group(common.VISION_TOWER, 2e-6),),
        warmup_ratio=0.03,
        clip_norm=1.0,
        loss_average="samples",  # the reference: one sample per device, then the mean of devices
    )
    config.compute.loss_chunk = 1024
    config.total_steps = 12_500  # 3.2 million samples
    return config


def stage1(text: dict[str, Any]) -> ConfigDict:
    """Stage 1: captions without a template, one squashed tile, only the projector is trained."""
    config = single_image(text)
    config.model.image.update(models.onevision_stage1_images())
    config.data.update(
        train=(common.source("blip_laion_cc_sbu_558k.json", image_root="images"),),
        template="plain",
        batch_size=64,  # of 8 samples: the reference's 512
        row_length=6144,
        visual_per_row=8 * 729,
        tiles_per_row=8,
        images_per_row=8,
    )
    config.optimizer.groups = common.train_only(common.CONNECTOR, lr=1e-3)
    config.total_steps = 1090  # 558,128 samples
    return config
