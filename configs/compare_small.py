r"""Fusion strategies side by side on counting in boxes of scattered shapes.

    python analyze.py compare --config configs/compare_small.py --output runs/compare_small \
        --config.data.root=DATA

DATA is that of nlvr_counts.py, whose model and data these are; the tower is trained along, from
nothing, unless an encoder is given:

    --config.compare.encoders="({'name': 'pretrained', 'path': 'runs/tower'},)"

Arms: `none` (the last vision layer), the best single layer instead, chosen on held-out training
pictures, `none` with a projector of four times the width, CLI, CLI without gates, `sli`,
`deepstack` and `layer_concat`. The budgets are provisional. What each setting means:
cli_jax/compare/config.py. configs/compare_smoke.py tries the command in two minutes.

Hardware: 2 CPU cores.
Time: not measured.
Expected result: not measured.
"""

from ml_collections import ConfigDict

from configs import arms, nlvr_counts

LAYERS = (1, 2)  # below the last one, which is `none`


def get_config() -> ConfigDict:
    config = nlvr_counts.get_config()
    config.name = "compare_small"
    config.eval.path = ""
    config.checkpoint.every = 500
    # hidden-1181-0-3: the last number counts the arrangements of the same boxes.
    config.data.update(held_out=0.1, scene=r"-\d(-[a-z]+)?$")
    width = config.model.text.hidden_size
    config.compare = ConfigDict(
        {
            "arms": (
                arms.arm("none", "none"),
                arms.arm("none_wide", "none", model={"projector_width": 4 * width}),
                arms.arm("cli", "cli"),
                arms.arm("cli_mean", "cli", settings={"agf": "mean"}),
                arms.arm("sli", "sli"),
                arms.arm("deepstack", "deepstack"),
                arms.arm("layer_concat", "layer_concat"),
                *arms.single_layers(LAYERS),
            ),
            "baseline": "none",
            "select": (arms.best_single_layer(*(f"layer_{k}" for k in LAYERS), "none"),),
            "evals": ({"name": "val", "path": "val.json"},),
            "encoders": ({"name": "scratch"},),
            "seeds": (0, 1, 2),
            "fractions": (1.0,),
            "held_out_questions": 2,
            "stage1": arms.stage1(steps=300, lr=2e-3),
            "stage2": {"steps": 2000, "changes": {}},
            "eval_every": 500,
            "draws": 10_000,
        }
    )
    return config
