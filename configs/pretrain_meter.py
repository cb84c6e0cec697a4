r"""The vision tower alone, on strips of photographed meters and their readings, by the SigLIP loss.

    python train.py --config configs/pretrain_meter.py --workdir runs/pretrain_meter \
        --config.data.root=DATA
    python analyze.py probe --workdir runs/pretrain_meter --output runs/pretrain_meter/probe

DATA is that of meter_digits.py. The captions are `coarse` (cli_jax/data/captions.py): the reading
in thousands, which leaves the three digits on the right open. The control reads all five, with
--config.data.captions=full. Three of the 18 meters are held out whole: the strips of a meter are
made of the same photographs over and over, so that strips of a known meter would measure memory.

The tower is as wide as those of pretrain_nlvr.py and sees a strip as meter_digits.py does. A model
starts from it with

    python train.py --config configs/meter_digits.py --workdir runs/meter_from_pretrained \
        --config.data.root=DATA --config.init_from=runs/pretrain_meter \
        --config.model.vision.num_hidden_layers=6 --config.model.vision.hidden_size=96 \
        --config.model.vision.intermediate_size=192

Hardware: 2 CPU cores.
Time: not measured yet.
Expected result: not measured yet.
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
