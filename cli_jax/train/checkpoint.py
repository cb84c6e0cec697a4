"""Checkpoints: written in the background, verified when read, never half of one.

A checkpoint holds `params`, `optimizer` (step and optimizer state), `data` (the data iterator, one
file per process) and `metadata` (the resolved config, the code's revision, and the shape, type and
checksum of every array). Orbax writes into a temporary directory and renames it when all is on
disk, so a killed save leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from cli_jax.experiment import CheckpointConfig, ConfigError, Experiment, to_dict
from cli_jax.train import resume
from cli_jax.train.fingerprint import inspect
from cli_jax.train.pieces import pieces
from cli_jax.train.state import Params, TrainState, leaf_paths, unflatten

FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the place and the remedy."""


class Checkpoints:
    """The checkpoints of a workdir, open for writing."""

    def __init__(self, workdir: str | epath.Path, config: CheckpointConfig) -> None:
        self.directory = epath.Path(workdir) / FOLDER
        keep: list[policies.PreservationPolicy] = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        with self._explained("open"):
            self._manager = ocp.CheckpointManager(
                self.directory.resolve(),
                options=ocp.CheckpointManagerOptions(
                    save_interval_steps=1,  # the loop decides when
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=True,
                ),
                item_handlers=_handlers(),
            )
        # Reads without waiting for other processes: one that finds damage would be waited for.
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
        handler = ocp.CompositeCheckpointHandler(**_handlers())
        self._reader = ocp.Checkpointer(handler, multiprocessing_options=alone)

    def latest(self) -> int | None:
        """The newest complete checkpoint on disk."""
        return max(_steps(self.directory), default=None)

    def save(
        self, state: TrainState, data: grain.DatasetIterator, experiment: Experiment, revision: str
    ) -> int:
        """Starts saving; returns the step once the state has been copied, before it is on disk.

        An earlier save that failed in the background raises here. A state that is not finite is
        never saved.
        """
        step = int(state.step)
        finite, checksums = inspect(state)
        if not finite:
            raise CheckpointError(
                f"the state after step {step} is not finite and was not saved; "
                f"{self.describe_latest()}"
            )
        metadata = {
            "experiment": to_dict(experiment),
            "revision": revision,
            "processes": jax.process_count(),
            "arrays": resume.describe(state, checksums),
        }
        with self._explained("save"):
            started = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params, save_args=pieces(state.params)),
                    optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
                    data=grain.checkpoint.CheckpointSave(data),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )
        if not started:
            raise CheckpointError(f"{self.directory} has a checkpoint of step {step} or later")
        return step

    def wait(self) -> None:
        """Returns when every started save is on disk, or raises what went wrong."""
        with self._explained("save"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(
        self, state: TrainState, data: grain.DatasetIterator, experiment: Experiment
    ) -> TrainState | None:
        """The newest checkpoint that can be read, or None if there is none; sets `data` to it.

        `state` holds `jax.ShapeDtypeStruct` with shardings, of any mesh. A damaged checkpoint is
        reported and moved aside, and the one before it is used. Raises `ConfigError`
        if the config asks for another model, optimizer or order of the data. Data that says
        `any_process_count` goes on from a checkpoint of another number of processes, too.
        """
        steps = sorted(_steps(self.directory), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            problem, found = "", None
            try:
                found = self._restore(step, state, data, experiment)
            except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the config's or the machine's trouble, not the checkpoint's
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                if jax.process_index():  # the first one reports, but does not know the reason
                    where = f"process {jax.process_index()} cannot read"
                    print(f"{where} {self.directory / str(step)}: {problem}", file=sys.stderr)
            good = _all_processes(found is not None)
            if found is None or not good:
                damaged[step] = problem or "damaged on another process"
            elif wrong := _changed(*found):  # computed by all processes together
                damaged[step] = wrong
            else:
                for bad, reason in damaged.items():
                    self._set_aside(bad, reason)
                return found[0]
        if damaged:
            listed = "\n  ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} can be read:\n  {listed}\n"
                f"Start again in an empty workdir"
            )
        return None

    def _restore(
        self, step: int, state: TrainState, data: grain.DatasetIterator, experiment: Experiment
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state, not verified yet, and the metadata; what this process does by itself."""
        metadata = self._read(step, metadata=ocp.args.JsonRestore())["metadata"]
        resume.check(metadata, experiment, state, data, self.directory / str(step))
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(state.params),
            optimizer=ocp.args.StandardRestore({"step": state.step, "state": state.opt_state}),
        )
        optimizer = restored["optimizer"]
        found = TrainState(optimizer["step"], restored["params"], optimizer["state"])
        if metadata["processes"] == jax.process_count():
            self._read(step, data=grain.checkpoint.CheckpointRestore(data))
        else:
            resume.set_data_of_any_process(data, self.directory / str(step), metadata["processes"])
        return found, metadata

    def describe_latest(self) -> str:
        """Where to go on from, for error messages."""
        latest = self.latest()
        if latest is None:
            return f"there is no good checkpoint in {self.directory} yet"
        return f"the last good checkpoint is {self.directory / str(latest)}"

    def close(self) -> None:
        self._manager.close()
        self._reader.close()

    def _read(self, step: int, **items: Any) -> Any:
        return self._reader.restore(
            self.directory.resolve() / str(step), ocp.args.Composite(**items)
        )

    def _set_aside(self, step: int, reason: str) -> None:
        """Reports a damaged checkpoint and moves it out of the way of the next one of its step."""
        folder, aside = self.directory / str(step), self.directory.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            print(f"checkpoint {folder} is damaged ({reason}); moved to {aside}", file=sys.stderr)
            aside.parent.mkdir(parents=True, exist_ok=True)
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)
        _all_processes(True)
        self._manager.reload()

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turns what the file system refuses into one line that says what is left to go on from."""
        try:
            yield
        except Exception as error:
            text = str(error)
            if "No space left" in text or "Disk quota" in text:
                reason = "the disk is full: free some space"
            elif isinstance(error, OSError) or "PERMISSION_DENIED" in text:
                reason = f"{type(error).__name__}: {text}"
            else:
                raise
            raise CheckpointError(
                f"cannot {action} checkpoints in {self.directory}: {reason}. "
                f"Then run the same command again; {self.describe_latest()}"
            ) from error


def load_params(
    workdir: str | epath.Path, step: int | None = None, abstract: Params | None = None
) -> Params:
    """The parameters of a checkpoint: the newest one, or that of a step.

    Without `abstract` every leaf is a numpy array. `abstract`, a tree of `jax.ShapeDtypeStruct`
    with shardings, gives device arrays read straight into those shards and cast to those types; it
    may leave out parameters. Raises `CheckpointError` if there is no such checkpoint or if it is
    damaged.
    """
    folder = _folder(workdir, step)
    try:
        metadata = _metadata(folder)
        if abstract is None:
            stored = unflatten(dict.fromkeys(_shapes(metadata), 0))
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        else:
            stored, restore = abstract, ocp.checkpoint_utils.construct_restore_args(abstract)
        with ocp.PyTreeCheckpointer() as reader:
            params = reader.restore(
                folder / "params",
                args=ocp.args.PyTreeRestore(stored, restore_args=restore, partial_restore=True),
            )
        if wrong := _changed({"params": params}, metadata):
            raise ValueError(wrong)
    except Exception as error:
        others = [s for s in _steps(folder.parent) if str(s) != folder.name]
        raise CheckpointError(
            f"{folder} cannot be read ({error}); other checkpoints: {others}"
        ) from error
    return params


def find_step(workdir: str | epath.Path, step: int | None = None) -> int:
    """The newest checkpoint's step, or `step` if there is one; `CheckpointError` if not."""
    directory = epath.Path(workdir) / FOLDER
    steps = _steps(directory)
    if not steps or step not in (None, *steps):
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise CheckpointError(f"there is no {wanted} in {directory}; it holds {steps}")
    return max(steps) if step is None else step


def stored_arrays(workdir: str | epath.Path) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters in the newest checkpoint."""
    return _shapes(_metadata(_folder(workdir, None)))


def _shapes(metadata: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        path.removeprefix("params/"): tuple(array["shape"])
        for path, array in metadata["arrays"].items()
        if path.startswith("params/")
    }


def _folder(workdir: str | epath.Path, step: int | None) -> epath.Path:
    return (epath.Path(workdir) / FOLDER).resolve() / str(find_step(workdir, step))


def _metadata(folder: epath.Path) -> dict[str, Any]:
    return json.loads((folder / "metadata" / "metadata").read_text())


def _changed(tree: Any, metadata: dict[str, Any]) -> str:
    """Which arrays that were not cast have other bits than were saved; empty if none."""
    saved, leaves = metadata["arrays"], leaf_paths(tree)
    _, found = inspect(tree)
    wrong = [
        path
        for path, leaf in leaves.items()
        if str(leaf.dtype) == saved[path]["dtype"] and found[path] != saved[path]["checksum"]
    ]
    return f"the contents of {wrong[:3]} are not what was saved" if wrong else ""


def _steps(directory: epath.Path) -> list[int]:
    """The complete checkpoints; on gs://, which cannot rename, one becomes so by a marker file."""
    return sorted(ocp.path.step.checkpoint_steps(directory))


def _handlers() -> dict[str, Any]:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "optimizer": ocp.StandardCheckpointHandler(),
        "data": grain.checkpoint.CheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
    }


def _all_processes(good: bool) -> bool:
    """Whether it is true on every process; a barrier, too."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))
