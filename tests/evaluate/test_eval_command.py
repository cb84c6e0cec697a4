"""eval.py and analyze.py, from a workdir on disk to files and exit codes."""

import contextlib
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cli_jax.analysis.constant_gates import with_constant_gates
from cli_jax.analysis.gates import mean_gates
from cli_jax.analysis.prompts import Prompts
from cli_jax.evaluate.workdir import open_run
from cli_jax.experiment import ConfigError
from cli_jax.generate.engine import split_rows
from cli_jax.train.checkpoint import CheckpointError
from tests.evaluate import eval_small as small
from tests.train.train_processes import run_together

COMMAND = small.load_command("eval")
ANALYZE = small.load_command("analyze")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    experiment = small.make_experiment(folder)
    _, params = small.make_model(experiment)
    small.save_workdir(folder / "run", experiment, params)
    small.save_questions(folder, 5)
    return folder


def options(folder, place, **more):
    pairs = {
        "workdir": folder / "run",
        "data": folder / "questions.json",
        "image_root": folder,
        "output": folder / place,
        **more,
    }
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))]


def test_a_workdir_is_opened_as_it_was_saved(folder):
    experiment = small.make_experiment(folder)
    _, params = small.make_model(experiment)
    run = open_run(folder / "run")
    assert (run.step, run.experiment) == (3, experiment)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)


def test_a_workdir_without_config_or_checkpoint_is_a_clear_error(folder, tmp_path):
    with pytest.raises(ConfigError, match="does not exist: give a --workdir"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint 4"):
        open_run(folder / "run", step=4)


def test_gates_are_put_at_their_means(folder, tmp_path, capsys):
    """Constant gates are those of the file for every picture; with others the logits change."""
    assert ANALYZE.main(["gates", *options(folder, "", output=tmp_path / "gates")]) == 0
    run = open_run(folder / "run")
    means = tmp_path / "gates" / "gates.npz"
    frozen = with_constant_gates(run, means)
    prompts = Prompts(run.experiment, folder / "questions.json", folder, limit=0, what="gates")
    with np.load(means) as found:
        W_TxK = found["gates"]
    for questions, batch in prompts.batches(5):
        W, own = (
            np.asarray(r.model.apply({"params": r.params}, split_rows(batch)).gates)
            for r in (frozen, run)
        )
        for b in range(len(questions)):
            np.testing.assert_allclose(W[:, b, 0], W_TxK, rtol=1e-5)
        assert np.ptp(own[:, : len(questions), 0], axis=1).max() > 1e-3
    answers = tmp_path / "constant.json"
    there = options(folder, "", output=answers, constant_gates=means)
    assert COMMAND.main(there) == 0
    results = json.loads(answers.read_text())
    assert results["experiment"].endswith(", constant gates")
    np.savez(tmp_path / "other.npz", gates=W_TxK, decoder_layers=["9"], vision_layers=["1"])
    other = options(folder, "", output=answers, constant_gates=tmp_path / "other.npz")
    assert COMMAND.main(other) == 1
    assert "gates of decoder layers 9 and vision layers 1, the run has" in capsys.readouterr().err
    whole = means.read_bytes()
    for name, content in (("none", None), ("empty", b""), ("half", whole[: len(whole) // 2])):
        if content is not None:
            (tmp_path / f"{name}.npz").write_bytes(content)
        damaged = options(folder, "", output=answers, constant_gates=tmp_path / f"{name}.npz")
        assert COMMAND.main(damaged) == 1
        assert f"{name}.npz cannot be read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def printed(folder):
    """What eval.py prints about all questions; its files are in `out`."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert COMMAND.main(options(folder, "out/results.json", step=3)) == 0
    return text.getvalue().splitlines()


def test_eval_writes_its_files_and_prints_a_table(folder, printed):
    results = json.loads((folder / "out" / "results.json").read_text())
    assert (results["step"], results["overall"]["n"]) == (3, 5)
    assert [line.split()[0] for line in printed[:4]] == ["category", "few", "many", "overall"]
    assert printed[-1] == f"written: {folder / 'out' / 'results.json'}"
    names = ["examples.png", "predictions.jsonl", "results.json"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == names


@pytest.mark.parametrize("count", [1, 2])
def test_four_devices_give_the_answers_of_one(folder, printed, count):
    """All of them one process's, or two of each of two processes'."""
    child, out = Path(__file__).with_name("mesh_child.py"), f"mesh_{count}"
    command = [sys.executable, str(child), str(folder), out]
    for child in run_together(command, count, folder / "cache", devices=4 // count):
        assert child.returncode == 0, child.stderr
    results = json.loads((folder / out / "results.json").read_text())
    assert results["device"].startswith("4 x")
    assert results["generation"]["batch_size"] == 8  # five rows do not split evenly
    one, four = ((folder / d / "predictions.jsonl").read_text() for d in ("out", out))
    assert four == one
    run = open_run(folder / "run")
    data = folder / "questions.json"
    means, _ = mean_gates(run.model, run.params, run.experiment, data, folder)
    np.testing.assert_allclose(np.load(folder / out / "gates.npy"), means.mean(), rtol=1e-5)


def test_gates_writes_its_files(folder, capsys):
    assert ANALYZE.main(["gates", *options(folder, "gates", limit=2)]) == 0
    with np.load(folder / "gates" / "gates.npz") as found:
        assert found["gates"].shape == (2, 2)
    with Image.open(folder / "gates" / "gates.png") as image:
        assert image.format == "PNG"
    assert capsys.readouterr().out.count("written: ") == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workdir": "nowhere"}, "nowhere/config.json does not exist"),
        ({"data": "nowhere.json"}, "nowhere.json does not exist"),
        ({"step": 9}, "no checkpoint 9"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "gates"])
def test_a_failure_is_one_line_and_an_exit_code(folder, capsys, command, more, message):
    output = "failed/results.json" if command == "eval" else "failed"
    arguments = options(folder, output, **more)
    code = COMMAND.main(arguments) if command == "eval" else ANALYZE.main(["gates", *arguments])
    assert code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (folder / "failed" / "results.json").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"limit": -1},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"output": "results.txt"},
        {"tasks": "chartqa"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_unusable_options_end_before_any_work(folder, capsys, more):
    with pytest.raises(SystemExit) as stop:
        COMMAND.main(options(folder, "x/results.json", **more))
    assert stop.value.code == 2
    assert next(iter(more)) in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["gates", "--help"], ["attention", "--help"]])
def test_help_explains_itself(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        (COMMAND if arguments[0] == "--help" else ANALYZE).main(arguments)
    assert stop.value.code == 0
    assert "--workdir" in capsys.readouterr().out
