r"""Photographed meters, from a decoder that reads already: fusion added to a trained `none`.

    python analyze.py compare --config configs/compare_meter_trained.py --output runs/trained \
        --config.data.root=DATA

As in the paper, what CLI is added to is a model that works: the decoder, projector and tower of the
comparison's own `none` (compare_meter.py, `coarse` tower, seed 0, 600 updates). Stage 1 trains only
what lies between tower and decoder, over all taps; stage 2 everything but the tower. `none` gets
the same updates. Without the alignment, at the same number of updates:

    --config.compare.stage1.steps=0 --config.compare.stage2.steps=500 --output runs/trained_at_once

All arms start from one model, so its luck is in all of them and not in the intervals.

Hardware: 1 CPU core.
Time: 69 minutes for the 15 runs, beside other work (2026-11-22).
Expected result: cli - none on val_seen +0.9 points [-0.9, +2.7], sli +1.7 [-0.1, +3.6], layer 1
alone +7.3 [+4.8, +9.9] (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, compare_meter


def get_config() -> ConfigDict:
    config = compare_meter.get_config()
    config.name = "compare_meter_trained"
    config.init_from = "runs/compare_meter/runs/coarse/1/none/seed_0/stage2"
    config.optimizer.lr = 1e-3
    config.compare.update(
        encoders=config.compare.encoders[:1],
        arms=(
            arms.arm("none", "none"),
            arms.arm("cli", "cli"),
            arms.arm("cli_mean", "cli", settings={"agf": "mean"}),
            arms.arm("sli", "sli"),
            arms.arm("layer_1", "none", settings={"vision_layer": 1}),
        ),
        select=(),
        contrasts=({"arm": "cli", "against": "none"},),
        stage1=arms.stage1(100, lr=1e-3),
        eval_every=200,
    )
    config.compare.stage2.steps = 400
    return config
