"""The training data of one process: sources, mixture, shuffle, shards, workers, exact state.

    per source   rows [start:stop] -> shuffle -> repeat        (cut first: nothing else gets in)
    mixture      exact proportions, sample by sample
    draw         read, tokenize, tile, augment                 (random by seed and index only)
    shard        every process_count-th sample
    pack, batch  in workers, if any; each packs every workers-th sample of the shard
    ledger       in the main process

With `data.bins` (made by cli_jax/data/prepare.py) bins of rows are shuffled instead, and nothing
is left to pack (bin_stream.py). Every draw is a function of (seed, index), so nothing random is
carried along.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from cli_jax.batch import Batch
from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data.bin_stream import BatchIterator, make_batches
from cli_jax.data.bins import extras_settings, load_for, settings_of
from cli_jax.data.collate import Sizes
from cli_jax.data.ledger import Drop, Ledger, Tally, report
from cli_jax.data.packing import OPEN_ROWS
from cli_jax.data.sample import SampleSpec
from cli_jax.data.sources import open_sources
from cli_jax.data.stream import Draw, PackedBatches, RowIndices
from cli_jax.experiment import ConfigError, DataConfig, SourceConfig
from cli_jax.image.extras import NO_EXTRAS, Extras
from cli_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Loader", "make_loader", "report"]

# Decoding overlaps with training; few samples are held, since one may have 37 tiles.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_BATCHES_PER_WORKER = 2
_PARTS = {"data.captions": "", "data.held_out": 0.0, "data.scene": ""}  # and their defaults


class Loader(grain.DatasetIterator):
    """An endless iterator of batches with an exact, JSON-able state.

    The state holds the position, the rows that are being packed and the ledger; `set_state` refuses
    one that was written under other settings. Packed online, it belongs to one process and one
    number of workers, since those decide which samples share a row. With bins the position is the
    same on every process, and any number of processes and workers may go on from any one's state:
    from another number of processes, all of them from process 0's, with its ledger.
    """

    def __init__(self, parent: grain.DatasetIterator, ledger: Ledger, settings: dict[str, Any]):
        super().__init__(parent)
        self._ledger, self._settings = ledger, settings

    @property
    def any_process_count(self) -> bool:
        """Whether a state of one number of processes may be set on another."""
        return bool(self._settings["data.bins"])

    def __next__(self) -> Batch:
        """The next batch; DataError when too many rows cannot be used, which ends the loader."""
        self._assert_not_closed()
        try:
            while not (batch := self._receive()):
                pass
        except Exception:
            self.close()  # or the workers would go on, and complain when they are torn down
            raise
        return cast(Batch, batch)

    def _receive(self) -> dict[str, np.ndarray]:
        """The next element's batch, empty if it only has a tally; its tally is booked."""
        element = next(self._parent)
        tally = json.loads(element["tally"])
        drops = [Drop(**drop) for drop in tally.pop("drops")]
        self._ledger.add(Tally(**tally, drops=drops))
        # Workers hand over shared memory, which Grain takes back with the array: copy that.
        return {
            name: value if type(value) is np.ndarray else np.array(value)
            for name, value in element["batch"].items()
        }

    def close(self) -> None:
        """Ends the workers; nothing can be read afterwards, the state included."""
        super().close()
        self._parents = ()  # Grain's iterators complain if they live until the interpreter ends

    def get_state(self) -> dict[str, Any]:
        self._assert_not_closed()
        return {
            "settings": self._settings,
            "stream": self._parent.get_state(),
            "ledger": self._ledger.state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; ConfigError if it is of another pipeline."""
        saved = {"data.bins": "", **_PARTS, **state["settings"]}
        names = list(self._settings)
        if bool(saved["data.bins"]) != bool(self._settings["data.bins"]):
            names = ["data.bins"]  # the other settings are of another kind
        different = [
            f"{name} was {saved.get(name)!r} and is {self._settings[name]!r}"
            for name in names
            if saved.get(name) != self._settings[name]
        ]
        if different:
            raise ConfigError(
                "the data state in the checkpoint cannot be continued: "
                f"{'; '.join(different)}. Restore the old values or start a new workdir"
            )
        self._parent.set_state(state["stream"])
        self._ledger.load(state["ledger"])


def make_loader(
    data: DataConfig,
    image: ImageConfig,
    vision: VisionConfig,
    *,
    seed: int,
    rows_per_process: int,
    process_index: int = 0,
    process_count: int = 1,
    extras: Extras = NO_EXTRAS,
    prompt_context: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Loader:
    """Opens `data.train` and returns the batches [rows_per_process, ...] of one process.

    `extras`: what the fusion strategy adds to every picture. `prompt_context`: check every sample
    as the gate context `prompt` requires. The tokenizer is `data.tokenizer` unless given. Call
    `close()` on the loader when done. Raises ConfigError or DataError for unusable settings or
    files; iteration raises DataError (see Ledger).
    """
    if rows_per_process < 1 or not 0 <= process_index < process_count:
        raise ConfigError(
            f"no rows for process {process_index} of {process_count}: rows_per_process = "
            f"{rows_per_process}; data.batch_size must be a multiple of the processes"
        )
    files, ranges, roots = open_sources(data)
    sizes = Sizes.from_config(data, vision, rows_per_process, extras)
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    spec = SampleSpec.from_config(data, image, vision, tokenizer, extras)
    draw = Draw(files, roots, spec, prompt_context)
    if data.workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask for flags, also outside absl.app

    settings: dict[str, Any] = {"data.bins": "", "seed": seed}
    process, seeds = (process_index, process_count), (_derive(seed, 0), _derive(seed, len(files)))
    stream: grain.DatasetIterator
    if data.bins:
        bins = load_for(data, settings_of(spec, data, files, ranges))
        batches = make_batches(bins, draw, sizes, process, seeds)
        stream = BatchIterator(batches, data.workers)
        settings |= {
            "data.bins": bins.fingerprint,
            "data.batch_size": rows_per_process * process_count,
        }
    else:
        drawn = _mixture(data.train, ranges, seed).random_map(draw, seed=seeds[1])
        stream = _packed_online(drawn[process_index::process_count], data, sizes)
        settings |= {
            "data.workers": data.workers,
            "process": list(process),
            "rows_per_process": rows_per_process,
            "data.pack": data.pack,
        }
    ledger = Ledger(
        [source.path for source in data.train],
        ranges,
        sizes,
        max_bad_share=data.max_bad_share,
        strict=data.strict,
        processes=process_count,
    )
    settings |= {
        "row": list(sizes.row),
        "data.template": data.template,
        "data.labels": data.labels,
        "data.augment": data.augment,
        "data.jitter": data.jitter,
        "data.turns": data.turns,
        "data.captions": data.captions,
        "data.held_out": data.held_out,
        "data.scene": data.scene,
        "data.train": [
            {"rows": list(rows), "weight": source.weight}
            for rows, source in zip(ranges, data.train, strict=True)
        ],
        "model.image": json.loads(json.dumps(dataclasses.asdict(image))),
        **extras_settings(extras),
    }
    return Loader(stream, ledger, settings)


def _packed_online(
    drawn: grain.MapDataset, data: DataConfig, sizes: Sizes
) -> grain.DatasetIterator:
    stream: grain.IterDataset = PackedBatches(
        drawn.to_iter_dataset(_READ), sizes, len(data.train), OPEN_ROWS if data.pack else 0
    )
    if data.workers:
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=data.workers, per_worker_buffer_size=_BATCHES_PER_WORKER
            )
        )
    return iter(stream)


def _mixture(sources: Sequence[SourceConfig], ranges: Sequence[tuple[int, int]], seed: int) -> Any:
    """An endless MapDataset of (source, row) pairs in the proportions of the weights."""
    parts = []
    for i, (start, stop) in enumerate(ranges):
        # Cut before shuffling: the other way round every epoch would draw from the whole file.
        rows = grain.MapDataset.source(RowIndices(i, stop))[start:]
        parts.append(rows.shuffle(seed=_derive(seed, i)).repeat())
    return grain.MapDataset.mix(parts, [source.weight for source in sources])


def _derive(seed: int, stream: int) -> int:
    """An independent 32-bit seed per purpose; Grain itself uses seed + epoch."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0])
