"""Packs a config's training data offline, into the file that `config.data.bins` names.

    python -m cli_jax.data.prepare --config configs/ov7b_cli.py \\
        --config.data.root=/data/llava --out /data/llava/bins.npz

Reads every row once and of every picture the header, in `config.data.workers` processes, and packs
the rows by best fit; with data.pack=False each has a bin of its own. Rows that cannot be used are
left out and listed in BINS.left_out.jsonl. The file belongs to this data, row size, template,
tokenizer and image settings: training refuses it under others. Prints how full the rows are and how
many samples an update has.

Exit code: 0 when the file is written; 1 with one line on stderr when something has to be changed
first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from cli_jax import experiment as experiment_lib
from cli_jax.data.offline import left_out_path, make_bins
from cli_jax.data.sources import DataError
from cli_jax.experiment import ConfigError
from cli_jax.flag_parser import parse
from cli_jax.text import load_tokenizer

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, e.g. configs/ov7b_cli.py.", lock_config=True
)
_OUT = flags.DEFINE_string("out", None, "The file to write, e.g. bins.npz.", required=True)
flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    try:
        experiment = experiment_lib.locate(experiment_lib.from_dict(_CONFIG.value), ".")
        data, model = experiment.data, experiment.model
        tokenizer = load_tokenizer(data.tokenizer)
        notes = make_bins(
            data,
            model.image,
            model.vision,
            tokenizer,
            _OUT.value,
            seed=experiment.seed,
            extras=experiment.extras,
        )
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write --out={_OUT.value}: {error}; choose another place")
    fill = ", ".join(f"{share:.1%} of the {name}" for name, share in notes["fill"].items())
    print(
        f"{notes['samples']:,} samples in {notes['bins']:,} bins, {notes['samples_per_bin']:.2f} "
        f"in each; filled: {fill}"
    )
    print(
        f"with data.batch_size={data.batch_size}: {notes['samples_per_update']:.1f} samples per "
        f"update, {notes['updates_per_epoch']:,.1f} updates per epoch"
    )
    if notes["left_out"]:
        print(f"{notes['left_out']:,} rows left out: {left_out_path(_OUT.value)}")
    print(f"train with --config.data.bins={Path(_OUT.value).absolute()}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
