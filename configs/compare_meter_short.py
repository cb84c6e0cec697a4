r"""The meter comparison in a quarter of an hour: one encoder, one seed, a quarter of the updates.

    python analyze.py compare --config configs/compare_meter_short.py --output runs/short \
        --config.data.root=DATA

The tower runs/meter_coarse of pretrain_meter.py must be there. For what is claimed see
compare_meter.py.

Hardware: 1 CPU core.
Time: 12 minutes of processor time, 18 beside another comparison (2026-11-21).
Expected result: none 11.0, cli 11.1, sli 10.4% of val_seen, all intervals around 0: after 150
updates nobody reads digits yet. It shows that everything works, and nothing about the strategies.
"""

from ml_collections import ConfigDict

from configs import compare_meter


def get_config() -> ConfigDict:
    config = compare_meter.get_config()
    config.name = "compare_meter_short"
    config.compare.update(encoders=config.compare.encoders[:1], seeds=(0,), eval_every=50)
    config.compare.stage2.steps = 150
    return config
