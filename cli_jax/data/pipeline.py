"""The training data of one process: sources, mixture, shuffle, shards, workers, exact state.

    per source   rows [start:stop] -> shuffle -> repeat        (cut first: nothing else gets in)
    mixture      exact proportions, sample by sample
    draw         read, tokenize, tile, augment                 (random by seed and index only)
    shard        every process_count-th sample
    pack, batch  in workers, if any; each packs every workers-th sample of the shard
    ledger       in the main process

Every draw is a function of (seed, index), so nothing random is carried along.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import grain
import numpy as np
from absl import flags

from cli_jax.batch import Batch
from cli_jax.config import ImageConfig, VisionConfig
from cli_jax.data.collate import Sizes
from cli_jax.data.ledger import Drop, Ledger, Tally, report
from cli_jax.data.packing import OPEN_ROWS
from cli_jax.data.sample import SampleSpec
from cli_jax.data.sources import RowFile
from cli_jax.data.stream import Draw, PackedBatches, RowIndices
from cli_jax.experiment import ConfigError, DataConfig, SourceConfig
from cli_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Loader", "make_loader", "report"]

# Decoding overlaps with training; few samples are held, since one may have 37 tiles.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_BATCHES_PER_WORKER = 2


class Loader(grain.DatasetIterator):
    """An endless iterator of batches with an exact, JSON-able state.

    The state holds the position, the rows that are being packed and the ledger. It belongs to one
    process and one pipeline: `set_state` refuses one that was written under other settings, the
    number of workers included, since that decides which samples share a row.
    """

    def __init__(self, parent: grain.DatasetIterator, ledger: Ledger, settings: dict[str, Any]):
        super().__init__(parent)
        self._ledger, self._settings = ledger, settings

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
        saved = state["settings"]
        different = [
            f"{name} was {saved.get(name)!r} and is {value!r}"
            for name, value in self._settings.items()
            if saved.get(name) != value
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
    prompt_context: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Loader:
    """Opens `data.train` and returns the batches [rows_per_process, ...] of one process.

    `prompt_context`: check every sample as the gate context `prompt` requires. The tokenizer is
    `data.tokenizer` unless given. Call `close()` on the loader when done. Raises ConfigError or
    DataError for unusable settings or files; iteration raises DataError (see Ledger).
    """
    if not data.train:
        raise ConfigError("data.train is empty: name at least one JSON or JSONL file")
    if rows_per_process < 1 or not 0 <= process_index < process_count:
        raise ConfigError(
            f"no rows for process {process_index} of {process_count}: rows_per_process = "
            f"{rows_per_process}; data.batch_size must be a multiple of the processes"
        )
    files = [RowFile(source.path) for source in data.train]
    ranges = [_range(source, len(file)) for source, file in zip(data.train, files, strict=True)]
    roots = [source.image_root or str(Path(source.path).parent) for source in data.train]
    sizes = Sizes.from_config(data, vision, rows_per_process)
    spec = SampleSpec.from_config(data, image, vision, tokenizer or load_tokenizer(data.tokenizer))
    draw = Draw(files, roots, spec, prompt_context)

    mixture = _mixture(data.train, ranges, seed)
    drawn = mixture.random_map(draw, seed=_derive(seed, len(files)))
    stream: grain.IterDataset = PackedBatches(
        drawn[process_index::process_count].to_iter_dataset(_READ),
        sizes,
        len(files),
        OPEN_ROWS if data.pack else 0,
    )
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers ask for flags, also outside absl.app
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=data.workers, per_worker_buffer_size=_BATCHES_PER_WORKER
            )
        )
    ledger = Ledger(
        [source.path for source in data.train],
        ranges,
        sizes,
        max_bad_share=data.max_bad_share,
        strict=data.strict,
    )
    settings = {
        "data.workers": data.workers,
        "seed": seed,
        "process": [process_index, process_count],
        "rows_per_process": rows_per_process,
        "data.pack": data.pack,
        "row": list(sizes.row),
        "data.template": data.template,
        "data.labels": data.labels,
        "data.augment": data.augment,
        "data.jitter": data.jitter,
        "data.vertical_flip": data.vertical_flip,
        "data.turns": data.turns,
        "data.train": [
            {"rows": list(rows), "weight": source.weight}
            for rows, source in zip(ranges, data.train, strict=True)
        ],
        "model.image": json.loads(json.dumps(dataclasses.asdict(image))),
    }
    return Loader(iter(stream), ledger, settings)


def _range(source: SourceConfig, length: int) -> tuple[int, int]:
    start, stop = source.start, source.stop or length
    if not 0 <= start < stop <= length:
        raise ConfigError(
            f"{source.path} has {length} rows: start = {source.start}, stop = {source.stop} "
            "select none of them or more than there are"
        )
    if not source.weight > 0:
        raise ConfigError(f"{source.path}: weight {source.weight} is not positive; remove it")
    return start, stop


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
