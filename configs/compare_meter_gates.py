r"""Do the gates of `cli` close before there is anything to let in?

    python analyze.py compare --config configs/compare_meter_gates.py --output runs/gates \
        --config.data.root=DATA

In compare_meter_limits.py one tap on layer 1 was worth more without its gate than with it, and
gates that began at 0.12 were at 0.015 after stage 1 (`cli`; on `tap_1_gated` at 0.11), all vision
layers alike, while in stage 2 those of early layers opened again. Here the gates stay where they
begin until stage 1 has aligned the taps; everything else, seeds included, is that of
compare_meter_limits.py, whose `none` is this one and whose `tap_1` would be the same here.
`_fast`: gates at ten times the rate in stage 2. `_wide`: they begin at 0.88.

Hardware: 2 CPU cores, a process on each.
Time: 21 minutes for the 12 runs (2026-11-22).
Expected result: no: on val_seen cli - none +0.1 points [-1.5, +1.6], tap_1_fast - tap_1_gated -0.2
[-1.4, +1.0], tap_1_wide - tap_1_gated +1.1 [-0.6, +2.9] (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, common, compare_meter_limits

# One pattern, as that of arms.stage1, since one that matches nothing is refused.
ALL_BUT_GATES = f"(?!{common.GATES})({common.CONNECTOR}|image_newline)"


def get_config() -> ConfigDict:
    config = compare_meter_limits.get_config()
    config.name = "compare_meter_gates"
    fast = arms.gates_at(1e-2)
    tap_1 = {"taps": (1,), "inject": (0,)}
    config.compare.update(
        arms=(
            arms.arm("none", "none"),
            arms.arm("cli", "cli"),
            arms.arm("cli_fast", "cli", optimizer=fast),
            arms.arm("tap_1_gated", "cli", settings=tap_1),
            arms.arm("tap_1_fast", "cli", settings=tap_1, optimizer=fast),
            arms.arm("tap_1_wide", "cli", settings={**tap_1, "gate_bias_init": 2.0}),
        ),
        contrasts=(
            {"arm": "cli", "against": "none"},
            {"arm": "tap_1_wide", "against": "tap_1_gated"},
            {"arm": "tap_1_fast", "against": "tap_1_gated"},
        ),
    )
    groups = common.train_only(ALL_BUT_GATES, lr=1e-3)
    config.compare.stage1.changes.optimizer.groups = groups
    return config
