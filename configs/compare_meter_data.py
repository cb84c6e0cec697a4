r"""What `cli` and `sli` buy on 20, 50 and 100% of the photographed meters.

    python analyze.py compare --config configs/compare_meter_data.py --output runs/compare_data \
        --config.data.root=DATA

Everything else but the number of seeds is that of compare_meter_trained.py: the model that fusion
is added to has seen all pictures, as the paper's has seen other data before; the fraction is that
of the pictures in both stages, as many updates on fewer of them.

Hardware: 2 CPU cores, a process on each.
Time: not measured; at the speed of compare_meter_ablations.py 40 minutes for the 18 runs.
Expected result: not run yet.
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
