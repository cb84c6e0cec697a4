"""LLaVA-1.5's recipes: what its two stages share.

Sizes: a picture has 576 tokens and one tile; a row of 4,096 tokens holds about four samples of the
665K mixture, so that 32 rows are the reference's batch of 128.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import common, models


def finetune(text: dict[str, Any]) -> ConfigDict:
    """Stage 2: projector and decoder are trained, the vision tower is frozen, no clipping."""
    config = common.base()
    common.set_model(config, models.clip_l14_336(), text, models.llava15_images())
    config.model.has_newline = False
    config.data.update(
        train=(common.source("llava_v1_5_mix665k.json"),),
        template="v1",
        labels="reference",
        batch_size=32,
        row_length=4096,
        visual_per_row=6 * 576,
        tiles_per_row=6,
        images_per_row=6,
        workers=16,
    )
    config.optimizer.update(
        lr=2e-5,
        groups=(common.group(common.VISION_TOWER, None),),
        warmup_ratio=0.03,
        clip_norm=0.0,
    )
    config.compute.loss_chunk = 1024
    config.total_steps = 5198  # 665,298 samples
    return config


def stage1(text: dict[str, Any]) -> ConfigDict:
    """Stage 1: captions without a template, center crops, only the projector is trained."""
    config = finetune(text)
    config.model.image.update(models.llava15_stage1_images())
    config.data.update(
        train=(common.source("blip_laion_cc_sbu_558k.json", image_root="images"),),
        template="plain",
        batch_size=32,  # of 8 samples: the reference's 256
        row_length=4864,
        visual_per_row=8 * 576,
        tiles_per_row=8,
        images_per_row=8,
    )
    config.optimizer.groups = common.train_only(common.CONNECTOR, lr=1e-3)
    config.total_steps = 2180  # 558,128 samples
    return config
