"""The dry run's report and proposals, with the TPU compiler replaced by numbers."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cli_jax.dryrun import chips, propose
from cli_jax.dryrun import compile as compiling
from cli_jax.dryrun import run as running
from cli_jax.dryrun.report import make_report
from cli_jax.experiment import ConfigError
from cli_jax.train.setup import make_setup
from tests.train import train_tiny

GIB = 2**30
ROOT = Path(__file__).parents[2]
TOPOLOGY = chips.Topology("v5e:1x1", dataclasses.replace(chips._CHIPS["v5e"]), jax.devices()[:1], 1)


def fake(total_of):
    """A compiler that needs as many GiB as `total_of(experiment)` says."""

    def compile_for(experiment, topology):
        setup = make_setup(experiment, topology.devices)
        total = total_of(experiment) * GIB
        memory = compiling.Memory(
            parameters=1.0 * GIB,
            optimizer=2.0 * GIB,
            batch=0.0,
            temporaries=total - 3.0 * GIB,
            output=3.0 * GIB,
            total=total,
            limit=16.0 * GIB,
        )
        text = "ENTRY %main (a: f32[]) -> f32[] {\n}\n" if memory.fits else ""
        return compiling.Compiled(setup, memory, text, 1.0)

    return compile_for


@pytest.fixture
def dry(monkeypatch, capsys):
    monkeypatch.setattr(running, "describe", lambda name: TOPOLOGY)

    def dry(experiment, total_of, **kwargs):
        monkeypatch.setattr(running, "compile_for", fake(total_of))
        monkeypatch.setattr(propose, "compile_for", fake(total_of))
        fits = running.dry_run(experiment, "v5e:1x1", **kwargs)
        return fits, capsys.readouterr().out

    return dry


def test_a_step_that_fits(dry, tmp_path):
    path = tmp_path / "new" / "report.json"
    fits, out = dry(train_tiny.experiment(), lambda e: 9, json_path=str(path))
    assert fits
    for words in ("9.00 of 16.00 GiB: FITS", "8 rows of 24 tokens", "vision", "agf", "MFU"):
        assert words in out, out
    report = json.loads(path.read_text())
    assert report["fits"]
    assert report["memory"]["total"] == 9 * GIB
    assert report["total_flops"] == sum(report["flops"].values())
    assert report["fusion_share"] > 0
    assert 0 < report["mfu_ceiling"] < 1
    assert report["bounds"]["step"] == max(
        report["bounds"][k] for k in ("compute", "memory", "network")
    )


@pytest.mark.parametrize(
    ("needs", "answer"),
    [
        (lambda e: 20 if e.compute.remat == "none" else 9, "--config.compute.remat=full\n"),
        (
            lambda e: 40 / e.optimizer.accumulate,
            "--config.compute.remat=full --config.optimizer.accumulate=4\n",
        ),
        (
            lambda e: 9 if e.compute.remat == "offload" else 20,
            ": --config.compute.remat=offload --config.optimizer.accumulate=8\n",
        ),
    ],
)
def test_a_step_that_does_not_fit_gets_a_command_that_does(dry, needs, answer):
    fits, out = dry(train_tiny.experiment(), needs)
    assert not fits
    assert "DOES NOT FIT" in out
    assert out.endswith(answer), out


def test_rows_are_shortened_last():
    e = train_tiny.experiment(data={"row_length": 4096, "visual_per_row": 3072})
    changes = [propose._flags(change) for change in propose._changes(e, 1)]
    assert changes[-3:] == [
        "--config.compute.remat=full --config.optimizer.accumulate=8 "
        f"--config.data.row_length={length} --config.data.visual_per_row={length - 1024}"
        for length in (3072, 2048)
    ] + [changes[-1]]
    assert "row_length=1024 --config.data.visual_per_row=512" in changes[-1]


def test_tensor_sizes_are_proposed_where_they_divide_the_heads():
    e = train_tiny.experiment(data={"batch_size": 8})
    tensor = [t for t in map(propose._flags, propose._changes(e, 8)) if "mesh.tensor" in t]
    assert [text.split("tensor=")[1].split()[0] for text in tensor] == ["2", "4"]


def test_nothing_fits(dry):
    fits, out = dry(train_tiny.experiment(), lambda e: 99)
    assert not fits
    assert "nothing that was tried fits" in out


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "h100:2x2", "v5e:16x16x", "0x*v5e:2x2"])
def test_a_topology_that_is_none_is_named(name):
    with pytest.raises(ConfigError, match="not CHIP:SHAPE"):
        chips.describe(name)


def test_a_dry_run_needs_a_topology():
    with pytest.raises(ConfigError, match="--topology=v5e:16x16"):
        running.dry_run(train_tiny.experiment(), "")


def test_a_tensor_size_that_cuts_heads_is_refused_with_those_that_do_not(dry, monkeypatch):
    monkeypatch.setattr("cli_jax.parallel.mesh.axis_sizes", lambda *_: (1, 1, 3))
    with pytest.raises(ConfigError, match=r"sizes that do: \[1, 2, 4\]"):
        dry(train_tiny.experiment(), lambda e: 9)


def test_what_does_not_fit_has_no_bounds(dry):
    experiment = train_tiny.experiment()
    compiled = fake(lambda e: 99)(experiment, TOPOLOGY)
    report = make_report(experiment, TOPOLOGY, compiled)
    assert report.collectives == {}
    assert "no step is faster" not in report.text()


@pytest.mark.parametrize(
    ("said", "total", "limit"),
    [
        (
            "Ran out of memory in memory space hbm. Used 17.26G of 15.75G hbm. Exceeded",
            17.26,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (15.82G) exceeds available HBM (15.75G).",
            17.82,  # and two of arguments
            15.75,
        ),
        ("HLO temporaries (1536M) exceeds available HBM (0.5G)", 3.5, 0.5),
    ],
)
def test_what_the_compiler_says_of_a_step_that_does_not_fit(said, total, limit):
    found = compiling._refused(RuntimeError(said), 2 * GIB)
    assert [x / GIB for x in found] == pytest.approx([total, limit])


def test_other_errors_of_the_compiler_are_not_swallowed():
    with pytest.raises(RuntimeError, match="something else"):
        compiling._refused(RuntimeError("something else"), 0.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dry_run"], "error: --dry_run needs --topology"),
        (["--dry_run", "--topology=h100"], "error: --topology=h100: not CHIP:SHAPE"),
        ([], "--workdir is required"),
    ],
)
def test_the_command_says_what_is_missing(flags, words):
    command = [sys.executable, "train.py", "--config", "configs/quickstart.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
