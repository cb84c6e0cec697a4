r"""Reading photographed meters: a CLI model on real pictures, trained from nothing.

    python train.py --config configs/meter_digits.py --workdir runs/meter_digits \
        --config.data.root=DATA

DATA holds train.json, val_seen.json, val.json and their pictures: strips of 160 x 48 pixels with
five digits of a meter. A strip is squashed to 160 x 160, so that a column of patches holds one
digit. Every sample asks one question: several answers about one strip can be copied from each
other, and a model that copies does not learn to look.

The evaluation at the end is on later pictures of the training meters; for meters never seen:

    python eval.py --workdir runs/meter_digits --data DATA/val.json --image_root DATA \
        --output runs/meter_digits/results_unseen.json

Hardware: 2 CPU cores, 4 GB of memory.
Time: 20 minutes for 1,063 of the 1,500 steps on a machine that was busy with other work.
Expected result: at step 1,063 with seed 0 (2026-11-21), single digits 79.9% on val_seen, 59.3% on
meters never seen; digits of whole readings in place 86.5% and 61.9%, whole readings 67.3% and
17.7%. With blanked pictures 9.6% of single digits on val_seen; always the commonest: 11%.
"""

from ml_collections import ConfigDict

from configs import common, models, small


def get_config() -> ConfigDict:
    config = small.base()
    config.name = "meter_digits"
    common.set_model(
        config,
        models.small_tower(image_size=160, patch_size=32, width=128, layers=3),
        models.small_decoder(width=128, layers=3),
        {"aspect_ratio": "square"},
    )
    config.data.update(
        train=(common.source("train.json"),),
        batch_size=128,
        row_length=64,
        visual_per_row=25,
        tiles_per_row=1,
        augment=0.3,
        jitter=0.3,
    )
    config.eval.update(path="val_seen.json", batch_size=64, max_new_tokens=8)
    config.total_steps = 1500
    return config
