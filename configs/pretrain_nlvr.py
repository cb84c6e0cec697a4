r"""The vision tower alone, on pictures of boxes and their captions, by the SigLIP loss.

    for CAPTIONS in coarse full; do
        python train.py --config configs/pretrain_nlvr.py --workdir runs/nlvr_$CAPTIONS \
            --config.data.root=DATA --config.data.captions=$CAPTIONS
        python analyze.py probe --workdir runs/nlvr_$CAPTIONS --output runs/nlvr_$CAPTIONS/probe
    done

DATA is that of nlvr_counts.py. The captions are `coarse` (cli_jax/data/captions.py): how many
objects and which colors are in each box, nothing of shapes and sizes. `full` ones, the control, say
all that is known. A tenth of the scenes is held out: held_out.jsonl says after every 200 steps how
many of their pictures find their own caption. Most captions leave much open, so several may be true
of a picture, and not all of them can. The run ends early, before the tower knows its 2,898
pictures by heart: the loss on held-out ones says when.

Pictures become tiles as in nlvr_counts.py: a tile per box shows shapes of 10 to 30 pixels at full
size, which a whole picture squashed into one tile would not, and the tower is the one that a
vision-language model then uses. All four tiles make the picture's embedding (JoinTiles in
cli_jax/pretrain/towers.py). Six layers, so that it makes a difference which one is read.
compare_nlvr.py starts from it.

Hardware: 1 CPU core.
Time: about 13 minutes, beside other work.
Expected result: (2026-11-21) the loss on held-out pictures falls to 3.42 with `full` captions, to
3.75 with `coarse` ones; of 324, 17.6% and 12.7% find their own among as many captions. What can be
read out of which layer: docs/results.md.
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
    config.total_steps = 600
    config.checkpoint.update(every=200, keep_every=200)
    return config
