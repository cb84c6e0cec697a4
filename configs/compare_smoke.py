r"""The whole comparison in two minutes, on handwritten digits that are made on the spot.

    python analyze.py compare --config configs/compare_smoke.py --output runs/compare_smoke

It shows how the command works; such short trainings tell nothing about the strategies.

Hardware: 2 CPU cores.
Time: not measured.
Expected result: a report in runs/compare_smoke/results.md.
"""

from ml_collections import ConfigDict

from configs import arms, common, quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.name = "compare_smoke"
    config.eval.path = ""
    config.compare = ConfigDict(
        {
            "arms": (
                arms.arm("none", "none"),
                arms.arm("cli", "cli"),
                *arms.single_layers((1, 2)),
            ),
            "baseline": "none",
            "select": (arms.best_single_layer("none", "layer_1", "layer_2"),),
            "evals": ({"name": "test", "path": "test.json"},),
            "encoders": ({"name": "scratch"},),
            "seeds": (0, 1),
            "fractions": (1.0,),
            "held_out": {"share": 0.05, "questions": 1, "together": ""},
            "split_seed": 0,
            "stage1": {
                "steps": 20,
                "changes": {
                    "optimizer": {
                        "groups": common.train_only(
                            "(multi_modal_projector|fusion)/.*|image_newline", lr=2e-3
                        )
                    }
                },
            },
            "stage2": {"steps": 60, "changes": {}},
            "eval_every": 30,
            "draws": 2000,
        }
    )
    return config
