"""The quick start: a CLI model learns to read handwritten digits, on a laptop, from nothing.

    python train.py --config configs/quickstart.py --workdir runs/quick

Makes its data first (cli_jax/demo/digits.py), trains, answers the test questions and leaves
results.json, predictions.jsonl, examples.png, loss.png and gates.png in the workdir.

Hardware: 2 CPU cores, 4 GB of memory (2.1 GB used); seeds 1 and 2 were run on one core.
Time: 5 minutes with installation (4 min 40 s on 2026-11-21, 4 min 57 s a day later).
Expected result: 77.5% of 600 test questions (seeds 0, 1 and 2 with an earlier compiler option: 75.7
to 79.7%; places 84 to 90%, counts 66 to 70%). Always the commonest answer: 21.8%; with blanked
pictures 17.7%.
"""

from ml_collections import ConfigDict

from configs import common, models, small


def get_config() -> ConfigDict:
    config = small.base()
    config.name = "quickstart"
    common.set_model(
        config,
        models.small_tower(image_size=64, patch_size=32, width=96, layers=3),
        models.small_decoder(width=128, layers=3),
        # Black is zero: what is not ink is nothing.
        {"aspect_ratio": "square", "image_mean": (0.0,) * 3, "image_std": (0.3,) * 3},
    )
    config.data.update(
        prepare="digits",
        train=(common.source("train.json"),),
        batch_size=128,
        row_length=36,
        visual_per_row=4,
        tiles_per_row=1,
        augment=0.2,
    )
    config.eval.update(path="test.json", batch_size=64, max_new_tokens=4)
    config.total_steps = 900
    config.checkpoint.every = 900
    return config
