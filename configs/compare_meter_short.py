r"""The meter comparison in a quarter of an hour: one encoder, one seed, a quarter of the updates.

    python analyze.py compare --config configs/compare_meter_short.py --output runs/short \
        --config.data.root=DATA

The tower runs/meter_coarse of pretrain_meter.py must be there. One seed of a short training ranks
how fast strategies begin to learn, and even that by chance: for what is claimed, compare_meter.py.

Hardware: 1 CPU core.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import compare_meter


def get_config() -> ConfigDict:
    config = compare_meter.get_config()
    config.name = "compare_meter_short"
    config.compare.update(encoders=config.compare.encoders[:1], seeds=(0,), eval_every=50)
    config.compare.stage2.steps = 150
    return config
