"""Small models trained from scratch on a laptop: what the demo configs share."""

from __future__ import annotations

from ml_collections import ConfigDict

from cli_jax.demo import TOKENIZER
from configs import common, models


def base() -> ConfigDict:
    """CLI over every layer, float32, loss on the answers only, an evaluation at the end."""
    config = common.base()
    config.fusion.name = "cli"
    config.fusion.cli.update(taps="all", inject="all", rank=8)
    config.fusion.deepstack.stacks = 2  # for decoders of 3 layers
    config.data.update(
        tokenizer=str(TOKENIZER),
        template="qwen_1_5",
        labels="answer_only",
        turns="one",  # answers about one picture hint at each other: see meter_digits.py
        pack=False,  # all samples are equally short: packing would only widen the attention
        images_per_row=1,
    )
    config.optimizer.update(lr=2e-3, b2=0.98, warmup_ratio=0.05, clip_norm=1.0)
    config.compute.update(dtype="float32", scan_layers=False, remat="none")
    config.log.every = 10
    return config


def pretrain(config: ConfigDict) -> ConfigDict:
    """Turns the config of a small model into that of its vision tower's contrastive pretraining."""
    config.objective = "siglip"
    config.fusion.name = "none"
    config.model.text.update(models.small_decoder(width=128, layers=2))  # reads the captions
    config.data.update(
        template="plain", turns="all", captions="coarse", batch_size=128, augment=0.5, jitter=0.3
    )
    config.eval.path = ""
    config.optimizer.update(name="adamw", weight_decay=0.1, warmup_ratio=0.05)
    config.total_steps = 3000
    config.checkpoint.update(every=500, keep_every=500)  # small, and each can be probed
    return config
