r"""Four runs of the meter comparison, in a quarter of an hour: one encoder, one seed, four arms.

    python analyze.py compare --config configs/compare_meter_short.py --output runs/short \
        --config.data.root=DATA

The tower runs/meter_coarse of pretrain_meter.py must be there. The runs are those of
compare_meter.py with the same encoder, arm and seed, update by update; one seed says little about
the strategies.

Hardware: 2 CPU cores.
Time: 14 minutes (2026-11-22), so the 54 runs of compare_meter.py take a bit over 3 hours there.
Expected result: 45 to 51% on val_seen, 20 to 24% on unseen; cli - none -0.9 points [-3.4, +1.7],
sli - none +4.7 [+2.0, +7.5] on val_seen. On one core `none` and `cli` had the numbers of the full
comparison to the last digit (46.3 and 45.4%); two cores add in another order.
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
