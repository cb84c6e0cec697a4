"""The dry run of a config: compile, report, and propose what fits when it does not."""

from __future__ import annotations

from pathlib import Path

import jax

from cli_jax.dryrun.chips import describe
from cli_jax.dryrun.compile import compile_for
from cli_jax.dryrun.propose import propose
from cli_jax.dryrun.report import Report, make_report
from cli_jax.experiment import ConfigError, Experiment


def dry_run(
    experiment: Experiment, topology_name: str, json_path: str = "", proposals: bool = True
) -> bool:
    """Prints the report of the config's step on a topology; True if it fits.

    Needs no weights, data or accelerator, only libtpu. `json_path`: also written there. When the
    step does not fit and `proposals` are wanted, changes are tried until one does, and the command
    line for it is printed.
    """
    if not topology_name:
        raise ConfigError("--dry_run needs --topology, e.g. --topology=v5e:16x16")
    if experiment.objective != "next_token":
        raise ConfigError(
            f"--dry_run counts a vision-language model, not config.objective={experiment.objective}"
        )
    jax.config.update("jax_platforms", "cpu")  # the compiler is all that is needed of a TPU
    topology = describe(topology_name)
    print(
        f"compiling the update of {experiment.name} for {len(topology.devices)} devices; "
        "this takes some minutes",
        flush=True,
    )
    compiled = compile_for(experiment, topology)
    report = make_report(experiment, topology, compiled)
    _write(report, json_path)
    print(report.text())
    if report.fits or not proposals:
        return report.fits
    print("trying what would fit:", flush=True)
    found = propose(experiment, topology, lambda text: print(text, flush=True))
    if found is None:
        print("nothing that was tried fits: take more chips, or a smaller model")
    else:
        print(f"fits with: {found[0]}")
    return False


def _write(report: Report, path: str) -> None:
    if not path:
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(report.to_json() + "\n")
    except OSError as error:
        raise ConfigError(f"--dry_run_json={path} cannot be written: {error.strerror}") from error
