r"""Counting in boxes of scattered shapes: a CLI model on real pictures, trained from nothing.

    python train.py --config configs/nlvr_counts.py --workdir runs/nlvr_counts \
        --config.data.root=DATA

DATA holds train.json, val.json and their pictures: 300 x 100 pixels, three boxes side by side, with
questions such as "How many small objects are in the left box?" (made from NLVR, Suhr et al. 2017).

Hardware: 2 CPU cores.
Time: not measured yet.
Expected result: not measured yet. Always the commonest answer: 27%.
"""

from ml_collections import ConfigDict

from configs import common, models, small


def get_config() -> ConfigDict:
    config = small.base()
    config.name = "nlvr_counts"
    common.set_model(
        config,
        models.small_tower(image_size=144, patch_size=16, width=128, layers=3),
        models.small_decoder(width=128, layers=3),
        {"aspect_ratio": "square"},
    )
    config.data.update(
        train=(common.source("train.json"),),
        batch_size=24,
        row_length=416,
        visual_per_row=81,
        tiles_per_row=1,
        pack=False,
    )
    config.eval.update(path="val.json", batch_size=64, max_new_tokens=4)
    config.total_steps = 1500
    return config
