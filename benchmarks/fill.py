"""How full are the rows of LLaVA-OneVision's configs, packed offline?

    python -m benchmarks.fill
    python -m benchmarks.fill --samples 200000 --rows 16384x15360    # tokens x visual slots

The shares of the mixture are those of the single-image stage in the LLaVA-OneVision paper (general
36.1%, documents and charts 20.6%, math and reasoning 20.1%, OCR 8.9%, language alone 14.3%). The
picture sizes are those usual in such sets (COCO, ChartQA, DocVQA, TextVQA, ScienceQA) and the text
lengths log-normal: an assumption. Tiles and tokens are the layout's own; packing is that of
`python -m cli_jax.data.prepare`.
"""

from __future__ import annotations

import argparse

import numpy as np

from cli_jax.data.best_fit import pack
from cli_jax.data.collate import Extent
from cli_jax.experiment import Experiment, from_dict
from cli_jax.image.anyres import layout_size
from configs import ov7b_cli

COCO = ((640, 480), (480, 640), (640, 427), (500, 375), (640, 640))
CHARTS = ((850, 600), (800, 557), (1200, 800))
PAGES = ((1700, 2200), (1654, 2339), (2550, 3300), (1280, 720))
DIAGRAMS = ((400, 300), (750, 429), (224, 224), (600, 400), (202, 326))
SCENES = ((1024, 768), (768, 1024), (1024, 683), (640, 480))
MIX = (  # share, picture sizes, median text tokens
    (0.361, COCO, 300),
    (0.103, CHARTS, 250),
    (0.103, PAGES, 250),
    (0.201, DIAGRAMS, 200),
    (0.089, SCENES, 150),
    (0.143, (), 500),
)
ROWS = ("10240x8832", "10240x9728", "16384x15360")
SIGMA = 0.8  # of the logarithm of text lengths


def draw(experiment: Experiment, samples: int, seed: int = 0) -> np.ndarray:
    """int [samples, 5] in the order of Extent: tokens, visual tokens, tiles, pictures, text."""
    rng, model = np.random.default_rng(seed), experiment.model
    longest = experiment.data.row_length
    rows = []
    for kind in rng.choice(len(MIX), samples, p=[share for share, _, _ in MIX]):
        _, sizes, median = MIX[kind]
        text = max(20, int(rng.lognormal(np.log(median), SIGMA)))
        tiles = visual = 0
        if sizes:
            size = sizes[rng.integers(len(sizes))]
            tiles, visual = layout_size(*size, model.image, model.vision, single=True)
        text = min(text, longest - visual)
        rows.append((text + visual, visual, tiles, int(bool(sizes)), text))
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--rows", nargs="*", default=ROWS, help="TOKENSxVISUAL")
    args = parser.parse_args()
    print("| row | visual slots | tiles | samples per row | tokens filled | visual | tiles |")
    print("|---" * 7 + "|")
    experiment = from_dict(ov7b_cli.get_config())
    data = experiment.data
    taken = draw(experiment, args.samples)
    for row in args.rows:
        length, visual = map(int, row.split("x"))
        tiles = data.tiles_per_row * length // data.row_length
        room = Extent(length, visual, tiles, data.images_per_row, length)
        offsets, _ = pack(taken, room, seed=0)
        bins = len(offsets) - 1
        filled = taken.sum(0) / bins / np.asarray(room)
        print(
            f"| {length:,} | {visual:,} | {tiles} | {args.samples / bins:.2f} | "
            f"{filled[0]:.1%} | {filled[1]:.1%} | {filled[2]:.1%} |"
        )


if __name__ == "__main__":
    main()
