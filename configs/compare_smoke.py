r"""The whole comparison in two minutes, on handwritten digits that are made on the spot.

    python analyze.py compare --config configs/compare_smoke.py --output runs/compare_smoke

It shows how the command works; such short trainings tell nothing about the strategies.

Hardware: 2 CPU cores.
Time: 2 min 28 s, 2 min 52 s of processor time, beside other work (2026-11-21).
Expected result: a report in runs/compare_smoke/results.md; of the 600 test questions none 21.4 +-
0.6%, cli 21.1 +- 1.1%, since 50 updates teach no more than the commonest answers.
"""

from ml_collections import ConfigDict

from configs import arms, common, models, quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.name = "compare_smoke"
    common.set_model(
        config,
        models.small_tower(image_size=64, patch_size=32, width=64, layers=2),
        models.small_decoder(width=64, layers=2),
        {},
    )
    config.data.update(batch_size=32, held_out=0.05)
    config.log.every = 5
    config.eval.path = ""
    config.compare = ConfigDict(
        {
            "arms": (
                arms.arm("none", "none"),
                arms.arm("cli", "cli"),
                *arms.single_layers((1,)),
            ),
            "baseline": "none",
            "select": (arms.best_single_layer("layer_1", "none"),),
            "evals": ({"name": "test", "path": "test.json"},),
            "encoders": ({"name": "scratch"},),
            "seeds": (0, 1),
            "fractions": (1.0,),
            "held_out_questions": 1,
            "stage1": arms.stage1(steps=10, lr=2e-3),
            "stage2": {"steps": 40, "changes": {}},
            "eval_every": 20,
            "draws": 2000,
        }
    )
    return config
