r"""Four runs of the meter comparison, in a quarter of an hour: one encoder, one seed, four arms.

    python analyze.py compare --config configs/compare_meter_short.py --output runs/short \
        --config.data.root=DATA

The tower runs/meter_coarse of pretrain_meter.py must be there. The runs are those of
compare_meter.py with the same encoder, arm and seed, update by update; one seed says little about
the strategies.

Hardware: 1 CPU core.
Time: not measured.
Expected result: not run yet.
"""

from ml_collections import ConfigDict

from configs import compare_meter

ARMS = ("none", "cli", "cli_mean", "sli")


def get_config() -> ConfigDict:
    config = compare_meter.get_config()
    config.name = "compare_meter_short"
    config.compare.update(
        arms=tuple(arm for arm in config.compare.arms if arm["name"] in ARMS),
        select=(),
        contrasts=({"arm": "cli", "against": "none"},),
        encoders=config.compare.encoders[:1],
        seeds=(0,),
    )
    return config
