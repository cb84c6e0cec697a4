"""May a run go on from a checkpoint? Compares what was saved with what the config asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from cli_jax.experiment import ConfigError, Experiment, to_dict
from cli_jax.train.state import leaf_paths

_REMEDY = (
    "Restore the old config, or use another --workdir, with --config.init_from set to this one to "
    "start from its parameters"
)
_MODEL = ("objective", "model", "fusion", "routing")  # what parameters mean depends on these


class ChangedRunError(ConfigError):
    """The config and the checkpoint belong to different runs."""


def describe(state: Any, checksums: dict[str, int]) -> dict[str, dict[str, Any]]:
    """{path: shape, dtype, checksum} of a state's arrays."""
    return {
        path: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": checksums[path]}
        for path, x in leaf_paths(state).items()
    }


def check(
    metadata: dict[str, Any], experiment: Experiment, state: Any, data: Any, where: os.PathLike
) -> None:
    """Raises `ChangedRunError` unless the checkpoint is of the same model, trained the same way.

    Learning rates, logging, evaluation, the mesh and the length of the run may change; the model
    (also where no shape tells, as of another vision layer), shapes and the choice of trained
    parameters may not. The order of the data is guarded by the data's own state, of which there is
    one per process; the number of processes may change if `data` says that all of them have the
    same (`data.any_process_count` is true).
    """
    problems = [
        *config_problems(metadata["experiment"], to_dict(experiment), _MODEL),
        *_array_problems(metadata["arrays"], state),
    ]
    if problems:
        shown = "\n  ".join(problems[:10] + (["..."] if len(problems) > 10 else []))
        raise ChangedRunError(
            f"the config does not fit the checkpoint {os.fspath(where)}:\n  {shown}\n{_REMEDY}"
        )
    before, now = metadata["processes"], jax.process_count()
    if before != now and not getattr(data, "any_process_count", False):
        raise ChangedRunError(
            f"{os.fspath(where)} was written by {before} processes and there are {now}, which "
            f"would change the order of data that is packed online: data packed offline "
            f"(config.data.bins) keeps its order. {_REMEDY}"
        )


def set_data_of_any_process(data: Any, folder: epath.Path, processes: int) -> None:
    """Sets `data` to the state that each of so many processes has written into a checkpoint."""
    data.set_state(json.loads((folder / "data" / f"process_0-of-{processes}.json").read_text()))


def config_problems(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], sections: Iterable[str]
) -> list[str]:
    """What differs between two experiments (as of `to_dict`) in sections such as `model.text`.

    Left aside: how to draw parameters, and settings that only one of the codes has.
    """
    found, now = (flatten_dict(dict(each), sep=".") for each in (saved, wanted))
    names = [name for name in now if any(f"{name}.".startswith(f"{s}.") for s in sections)]
    return [
        f"config.{name}: checkpoint {found[name]!r}, config {now[name]!r}"
        for name in names
        if not name.endswith(".initializer_range") and found.get(name, now[name]) != now[name]
    ]


def _array_problems(saved: dict[str, dict[str, Any]], state: Any) -> list[str]:
    wanted = {
        path: (tuple(x.shape), str(np.dtype(x.dtype))) for path, x in leaf_paths(state).items()
    }
    found = {path: (tuple(a["shape"]), a["dtype"]) for path, a in saved.items()}
    problems = []
    for path in sorted({*wanted, *found}):
        if path not in found:
            problems.append(f"{path}: not in the checkpoint")
        elif path not in wanted:
            problems.append(f"{path}: only in the checkpoint")
        elif wanted[path] != found[path]:
            problems.append(f"{path}: checkpoint {found[path]}, config {wanted[path]}")
    return problems
