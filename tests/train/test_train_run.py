"""`run` on real files: data, training, evaluation and pictures; and what train.py says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_tiny
from PIL import Image

from cli_jax.demo import TOKENIZER
from cli_jax.experiment import (
    ConfigError,
    DataConfig,
    EvalConfig,
    SourceConfig,
    load,
    to_dict,
)
from cli_jax.train import loop
from cli_jax.train import run as run_module
from cli_jax.train.checkpoint import find_step
from cli_jax.train.run import run
from cli_jax.train.step import lower_step

ROOT = Path(__file__).parents[2]


def write_data(folder: Path) -> None:
    """Six pictures with one question each; they are the evaluation, too."""
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        talk = [
            {"from": "human", "value": "<image>\nHow many?"},
            {"from": "gpt", "value": str(i)},
        ]
        rows.append({"id": f"row{i}", "image": f"{i}.png", "conversations": talk})
    rows.append({"id": "broken", "image": "missing.png", "conversations": rows[0]["conversations"]})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[:3]))


@pytest.fixture
def experiment(tmp_path):
    write_data(tmp_path)
    base = train_tiny.experiment(total_steps=3)
    text = dataclasses.replace(base.model.text, vocab_size=320)
    data = DataConfig(
        root=str(tmp_path),
        train=(SourceConfig("train.json"),),
        tokenizer=str(TOKENIZER),
        batch_size=4,
        row_length=64,
        visual_per_row=8,
        tiles_per_row=2,
        images_per_row=2,
        max_bad_share=0.5,
    )
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, text=text),
        data=data,
        eval=EvalConfig(path="test.json", batch_size=2, max_new_tokens=2),
    )


def test_a_run_trains_evaluates_and_draws(experiment, tmp_path, monkeypatch, capsys):
    compile_quickly = lambda setup: lower_step(setup).compile(train_tiny.QUICK)  # noqa: E731
    monkeypatch.setattr(loop, "compile_step", compile_quickly)
    workdir = tmp_path / "run"
    assert run(experiment, str(workdir)) is True
    left = {path.name for path in workdir.iterdir()}
    assert left >= {
        "config.json",
        "run.json",
        "checkpoints",
        "metrics.jsonl",
        "results.json",
        "predictions.jsonl",
        "examples.png",
        "loss.png",
        "gates.png",
    }
    results = json.loads((workdir / "results.json").read_text())
    assert results["overall"]["n"] == 3
    assert results["step"] == find_step(workdir) == 3
    out = capsys.readouterr().out
    assert "new: fusion/*" in out
    assert "1 unusable and 0 too long rows dropped" in out
    # The saved config finds the data from anywhere.
    assert load(workdir).data.train[0].path == str(tmp_path / "train.json")
    assert to_dict(load(workdir))["name"] == "tiny"


def test_an_interrupted_run_is_not_evaluated(experiment, tmp_path, monkeypatch, capsys):
    state = type("State", (), {"step": 2})
    stopped = loop.Result(None, state, complete=False)
    monkeypatch.setattr(run_module, "train", lambda *_, **__: stopped)
    assert run(experiment, str(tmp_path / "run")) is False
    assert "interrupted and saved after step 2: the same command" in capsys.readouterr().out
    assert not (tmp_path / "run" / "results.json").exists()


def test_what_can_be_wrong_is_found_before_anything_is_trained(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "train", lambda *_, **__: pytest.fail("it trained"))
    missing = dataclasses.replace(experiment, eval=EvalConfig(path="nowhere.json"))
    with pytest.raises(ConfigError, match=r"config.eval.path=.*nowhere.json does not exist"):
        run(missing, str(tmp_path / "run"))
    text = dataclasses.replace(experiment.model.text, vocab_size=100)
    small = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, text=text))
    with pytest.raises(ConfigError, match=r"ids up to 301, but .*vocab_size is 100"):
        run(small, str(tmp_path / "run"))


def command(tmp_path, *arguments, **changes):
    """Runs train.py with a config file that holds the tiny run and the changes."""
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({train_tiny.config() | changes!r})\n"
    )
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"--config={config}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_misspelled_flag_is_one_line_with_the_nearest_name(tmp_path):
    done = command(tmp_path, "--workdir=w", "--config.optimizer.lrr=1")
    assert done.returncode == 1
    assert done.stderr == (
        'error: unknown name in a --config flag: \'lrr\' Did you mean "lr" instead of "lrr"?\n'
    )


def test_a_misspelled_key_of_the_config_file_is_one_line_with_the_nearest_name(tmp_path):
    done = command(tmp_path, "--workdir=w", optimizer={"warmup": 0.1})
    assert done.returncode == 1
    assert done.stderr == (
        "error: unknown key config.optimizer.warmup; did you mean 'warmup_ratio'?\n"
    )


def test_an_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = command(tmp_path, f"--workdir={tmp_path}/file/run")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot write to {tmp_path}/file/run: Not a directory. Choose another folder, or "
        "free some space\n"
    )
