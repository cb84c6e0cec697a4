r"""What `cli` and `sli` buy on 20, 50 and 100% of the photographed meters.

    python analyze.py compare --config configs/compare_meter_data.py --output runs/compare_data \
        --config.data.root=DATA

Everything else is that of compare_meter.py, with the `coarse` tower alone: as many updates on fewer
pictures.

Hardware: 1 CPU core.
Time: not measured; at the speed of compare_meter.py about 2.3 hours for the 27 runs.
Expected result: not run yet.
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter


def get_config() -> ConfigDict:
    config = compare_meter.get_config()
    config.name = "compare_meter_data"
    config.compare.update(
        encoders=config.compare.encoders[:1],
        fractions=(0.2, 0.5, 1.0),
        arms=(arms.arm("none", "none"), arms.arm("cli", "cli"), arms.arm("sli", "sli")),
        select=(),
        contrasts=({"arm": "cli", "against": "none"}, {"arm": "sli", "against": "none"}),
    )
    return config
