r"""The vision tower alone, on pictures of boxes and their captions, by the SigLIP loss.

    python train.py --config configs/pretrain_nlvr.py --workdir runs/pretrain_nlvr \
        --config.data.root=DATA
    python analyze.py probe --workdir runs/pretrain_nlvr --output runs/pretrain_nlvr/probe

DATA is that of nlvr_counts.py. The captions are `coarse` (cli_jax/data/captions.py): how many
objects and which colors are in each box, nothing of shapes and sizes. The control reads captions
that say all that is known, with --config.data.captions=full. A tenth of the scenes is held out:
held_out.jsonl says after every 500 steps how many of their pictures find their own caption. Most
captions leave much open, so several may be true of a picture, and not all of them can.

Pictures become tiles as in nlvr_counts.py: a tile per box shows shapes of 10 to 30 pixels at full
size, which a whole picture squashed into one tile would not, and the tower is the one that a
vision-language model then uses. All four tiles make the picture's embedding (JoinTiles in
cli_jax/pretrain/towers.py). Six layers, so that it makes a difference which one is read. A model
starts from it with

    python train.py --config configs/nlvr_counts.py --workdir runs/nlvr_from_pretrained \
        --config.data.root=DATA --config.init_from=runs/pretrain_nlvr \
        --config.model.vision.num_hidden_layers=6 --config.model.vision.hidden_size=96 \
        --config.model.vision.intermediate_size=192

Hardware: 2 CPU cores.
Time: not measured yet.
Expected result: not measured yet.
"""

from ml_collections import ConfigDict

from configs import models, nlvr_counts, small


def get_config() -> ConfigDict:
    config = small.pretrain(nlvr_counts.get_config())
    config.name = "pretrain_nlvr"
    config.model.vision.update(models.small_tower(image_size=96, patch_size=24, width=96, layers=6))
    config.data.update(
        scene=r"-\d$",  # the last number of an id counts the arrangements of the same boxes
        held_out=0.1,
        row_length=94,  # 30 of the picture, 57 at most of a caption
    )
    return config
