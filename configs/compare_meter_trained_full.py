r"""Photographed meters, where the last layer has lost detail: fusion added to a trained `none`.

    python analyze.py compare --config configs/compare_meter_trained_full.py --output runs/full \
        --config.data.root=DATA

Everything but the tower and three more arms is that of compare_meter_trained.py. `full`
(pretrain_meter.py) is the one tower of docs/results.md of which the last layer gives less than an
earlier one, as the paper presupposes: single digits of meters never seen are read out at 36.6% from
layer 2 and at 31.9% from layer 6. `none` is the comparison's own (compare_meter.py, `full` tower,
seed 0).

- `layer_1` and `layer_2` read that layer in place of layer 6.
- `tap_2` adds layer 2 to decoder layer 0 through the shared projector and rank 8, `tap_2_gated`
  also through a gate.

Hardware: 2 CPU cores, a process on each.
Time: 48 minutes for the 24 runs (2026-11-22).
Expected result: on val_seen cli - none +0.2 points [-0.9, +1.4], tap_2 - none +1.1 [-0.5, +2.9],
layer_1 - none +3.9 [+0.7, +7.5] (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter, compare_meter_trained


def get_config() -> ConfigDict:
    config = compare_meter_trained.get_config()
    config.name = "compare_meter_trained_full"
    config.init_from = "runs/compare_meter/runs/full/1/none/seed_0/stage2"
    tap_2 = {"taps": (2,), "inject": (0,)}
    config.compare.update(
        encoders=compare_meter.get_config().compare.encoders[1:],
        arms=(
            *config.compare.arms,
            arms.arm("layer_2", "none", settings={"vision_layer": 2}),
            arms.arm("tap_2_gated", "cli", settings=tap_2),
            arms.arm("tap_2", "cli", settings={**tap_2, "agf": "one"}),
        ),
        contrasts=(
            {"arm": "cli", "against": "none"},
            {"arm": "tap_2", "against": "none"},
        ),
    )
    return config
