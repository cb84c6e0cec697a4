r"""Fusion strategies side by side on photographed meters, over pretrained towers that stay frozen.

    python analyze.py compare --config configs/compare_meter.py --output runs/compare_meter \
        --config.data.root=DATA

DATA is that of meter_digits.py. The towers are those of pretrain_meter.py, trained before: `coarse`
was never told of the three digits on the right, `full` is the control. A tenth of the strips is
held out for the choice of the best single layer; val_seen are later strips of the same meters,
unseen are others.

What each setting means: cli_jax/compare/config.py.

Hardware: 1 CPU core.
Time: 4.6 hours for the 54 runs, beside other work on the machine (2026-11-22). Started on each of
two cores, as compare_meter_ablations.py was, it should need about half (not measured).
Expected result: no gain of cli: cli - none on val_seen -0.5 points [-3.1, +2.1], cli - best single
layer -5.3 [-11.9, +1.9]; early layers help: sli +3.2 and +3.3 (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import arms, meter_digits, models


def get_config() -> ConfigDict:
    config = meter_digits.get_config()
    config.name = "compare_meter"
    config.model.vision.update(
        models.small_tower(image_size=160, patch_size=32, width=96, layers=6)
    )
    config.model.text.update(models.small_decoder(width=128, layers=4))
    config.data.update(batch_size=64, held_out=0.1, jitter=0.0)
    config.eval.path = ""
    config.compare = arms.headline(
        width=config.model.text.hidden_size,
        encoders={name: f"runs/meter_{name}" for name in ("coarse", "full")},
        evals={"val_seen": "val_seen.json", "unseen": "val.json"},
        steps=600,
    )
    config.compare.held_out_questions = 1
    return config
