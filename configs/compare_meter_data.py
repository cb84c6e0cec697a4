r"""What `cli` and `sli` buy on 20, 50 and 100% of the photographed meters.

    python analyze.py compare --config configs/compare_meter_data.py --output runs/compare_data \
        --config.data.root=DATA

Everything else but the number of seeds is that of compare_meter_trained.py: the model that fusion
is added to has seen all pictures, as the paper's has seen other data before; the fraction is that
of the pictures in both stages, as many updates on fewer of them.

Hardware: 1 CPU core, for the last quarter of an hour 2 with a process each.
Time: 45 minutes for the 18 runs (2026-11-22).
Expected result: cli - none on val_seen +0.9 points [-0.7, +2.5] on 20%, +1.1 [-0.3, +2.6] on 50%,
+1.5 [-0.2, +3.3] on 100%; sli - none +0.3, +1.9, +1.9, no interval above 0 (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter_trained


def get_config() -> ConfigDict:
    config = compare_meter_trained.get_config()
    config.name = "compare_meter_data"
    config.compare.update(
        fractions=(0.2, 0.5, 1.0),
        arms=(arms.arm("none", "none"), arms.arm("cli", "cli"), arms.arm("sli", "sli")),
        contrasts=({"arm": "cli", "against": "none"}, {"arm": "sli", "against": "none"}),
        seeds=(0, 1),
    )
    return config
