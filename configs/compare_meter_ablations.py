r"""What limits CLI on the photographed meters: `cli` with one thing changed, and other strategies.

    python analyze.py compare --config configs/compare_meter_ablations.py --output runs/ablations \
        --config.data.root=DATA

Started once per core (`taskset -c 0 python ... & taskset -c 1 python ... & wait`), the processes
share the runs. Everything else but the number of seeds is that of compare_meter_trained.py: all
arms start from one trained `none`, get 100 updates of what lies between tower and decoder and 400
of everything but the tower. `cli_slow`: gates at a tenth of the rate. `sli_1`: layer 1 through an
MLP of its own, added to the input without a gate, the most that a tap on layer 1 at decoder layer 0
could be. `adapter`: as many new parameters as `cli`, which see no other vision layer. `dpvr`:
layers 0 and 1 see all tokens, layer 2 text, layer 3 both; unlike in the paper everything is
trained. Strategies that cannot use the projector of `none` learn theirs anew.

Hardware: 2 CPU cores, a process on each.
Time: 85 minutes for the 44 runs (2026-11-22).
Expected result: cli - none on val_seen +1.5 points [-0.2, +3.3], cli_early_tap the same, with gates
of their own per vision layer +2.3 [+0.6, +4.0], sli_1 +4.2 [+1.9, +6.6] (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter_trained


def get_config() -> ConfigDict:
    config = compare_meter_trained.get_config()
    config.name = "compare_meter_ablations"
    config.data.text_per_row = config.data.row_length - config.data.visual_per_row  # for dpvr
    config.compare.update(
        arms=(
            *arms.ablations(),
            arms.arm("cli_slow", "cli", optimizer=arms.gates_at(1e-4)),
            arms.arm("sli_1", "sli", settings={"taps": (1,)}),
            arms.arm("adapter", "adapter", settings={"inject": "all", "rank": 13}),
            arms.arm("dense_connector", "dense_connector"),
            arms.arm("mmfuser", "mmfuser"),
            arms.arm("dpvr", "none", routing={"name": "dpvr", "saturation": 2}),
        ),
        seeds=(0, 1),
    )
    return config
