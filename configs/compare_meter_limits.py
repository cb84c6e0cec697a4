r"""What stands between a tap of `cli` and a projector of its own, and which gates to prefer.

    python analyze.py compare --config configs/compare_meter_limits.py --output runs/limits \
        --config.data.root=DATA

Everything but arms and seeds is that of compare_meter_ablations.py, which left two questions:

- Layer 1 through an MLP of its own, added to the input (`sli_1`), bought more than all taps of
  `cli`. From one to the other, a step at a time: `tap_1_gated` takes the same layer to the same
  place through the shared projector, rank 8 and a gate; `tap_1` has no gate; `tap_1_full` has
  rank 96, the width of the tower, so its branch is any linear map.
- On held-out training pictures gates of their own per vision layer were the best of the `cli` arms
  (`cli_per_pair`); gates that read the question (`cli_prompt`) were second on val_seen. Here both
  and their sum are tried on seeds that had no part in the choice.

Hardware: 2 CPU cores, a process on each.
Time: 33 minutes for the 18 runs (2026-11-22).
Expected result: on val_seen cli_per_pair - cli +0.4 points [-1.0, +1.8], cli_prompt - cli +0.2
[-0.7, +1.2], sli_1 - tap_1 +0.0 [-1.4, +1.5], tap_1 - none +2.3 [+0.3, +4.3] (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter_ablations


def get_config() -> ConfigDict:
    config = compare_meter_ablations.get_config()
    config.name = "compare_meter_limits"
    tap_1 = {"taps": (1,), "inject": (0,)}
    config.compare.update(
        arms=(
            arms.arm("none", "none"),
            arms.arm("cli", "cli"),
            arms.arm("cli_per_pair", "cli", settings={"per_pair": True}),
            arms.arm("cli_prompt", "cli", settings={"context": "prompt"}),
            arms.arm("cli_both", "cli", settings={"per_pair": True, "context": "prompt"}),
            arms.arm("tap_1_gated", "cli", settings=tap_1),
            arms.arm("tap_1", "cli", settings={**tap_1, "agf": "one"}),
            arms.arm("tap_1_full", "cli", settings={**tap_1, "agf": "one", "rank": 96}),
            arms.arm("sli_1", "sli", settings={"taps": (1,)}),
        ),
        contrasts=(
            {"arm": "cli_per_pair", "against": "cli"},
            {"arm": "cli_prompt", "against": "cli"},
            {"arm": "sli_1", "against": "tap_1"},
        ),
        seeds=(2, 3),
    )
    return config
