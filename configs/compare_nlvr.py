r"""Fusion strategies side by side on boxes of shapes, over pretrained towers that stay frozen.

    python analyze.py compare --config configs/compare_nlvr.py --output runs/compare_nlvr \
        --config.data.root=DATA

DATA is that of nlvr_counts.py. The towers are those of pretrain_nlvr.py, trained before: `coarse`
was never told of shapes, sizes and counts of a color, `full` is the control. The scenes that they
have not seen are held out here, too, for the choice of the best single layer.

Decoders are trained with Muon, as in nlvr_counts.py. What each setting means:
cli_jax/compare/config.py.

Hardware: 1 CPU core.
Time: about 5 hours for the 54 runs, in several sittings beside other work (2026-11-22).
Expected result: nothing is decided: all arms count (45 to 47%) and see no shape or size; cli - none
is -0.2 points [-1.8, +1.2] on shapes, -0.9 [-2.7, +0.9] on sizes (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, models, nlvr_counts


def get_config() -> ConfigDict:
    config = nlvr_counts.get_config()
    config.name = "compare_nlvr"
    config.model.vision.update(models.small_tower(image_size=96, patch_size=24, width=96, layers=6))
    config.model.text.update(models.small_decoder(width=128, layers=4))
    # The last number of an id counts the arrangements of the same boxes; val.json adds a category.
    config.data.update(batch_size=32, row_length=60, held_out=0.1, scene=r"-\d(-[a-z]+)?$")
    config.eval.path = ""
    config.compare = arms.headline(
        width=config.model.text.hidden_size,
        encoders={name: f"runs/nlvr_{name}" for name in ("coarse", "full")},
        evals={"val": "val.json"},
        categories=("shape", "size"),
        steps=1000,
    )
    config.compare.held_out_questions = 2
    return config
