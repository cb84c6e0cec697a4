r"""The vision tower alone, on strips of photographed meters and their readings, by the SigLIP loss.

    for CAPTIONS in coarse full; do
        python train.py --config configs/pretrain_meter.py --workdir runs/meter_$CAPTIONS \
            --config.data.root=DATA --config.data.captions=$CAPTIONS
        python analyze.py probe --workdir runs/meter_$CAPTIONS --output runs/meter_$CAPTIONS/probe
    done

DATA is that of meter_digits.py. The captions are `coarse` (cli_jax/data/captions.py): the reading
in thousands, which leaves the three digits on the right open. `full` ones, the control, read all
five. Three of the 18 meters are held out whole: the strips of a meter are made of the same
photographs over and over, so that strips of a known meter would measure memory.

The tower is as wide as those of pretrain_nlvr.py and sees a strip as meter_digits.py does.
compare_meter.py starts from it.

Hardware: 1 CPU core.
Time: 27 and 33 minutes, beside other work.
Expected result: `coarse` (2026-11-21): 20.7% of 498 held-out strips find their own among 95
captions; single digits of meters never seen can be read out linearly at 28.8% from layer 1, 36.6%
from layer 2, 34.8 to 38.7% from the others. `full` (2026-11-22) learns its strips by heart: 0.4% of
the held-out strips find their own among 498 captions; digits 28.8% from layer 1, 36.6% from layer
2, 31.2 to 35.9% from the others.
"""

from ml_collections import ConfigDict

from configs import meter_digits, models, small


def get_config() -> ConfigDict:
    config = small.pretrain(meter_digits.get_config())
    config.name = "pretrain_meter"
    config.model.vision.update(
        models.small_tower(image_size=160, patch_size=32, width=96, layers=6)
    )
    config.data.update(
        scene=r"-\d+$",  # what is left of an id is the meter
        held_out=1 / 6,
        row_length=40,  # 25 of the picture, 12 at most of a caption
    )
    return config
