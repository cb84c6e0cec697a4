"""Every shape of an 8-device mesh trains as one device does: packed rows, any-res, accumulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli_jax.fusion import registry

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("mesh_shapes_child.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_child(tmp_path_factory.mktemp("pictures"))


def run_child(folder, **other):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "data")])
    done = subprocess.run(
        [sys.executable, str(CHILD), str(folder), *([json.dumps(other)] if other else [])],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_batches_are_packed_and_any_res(found):
    assert found["packed"] > 0.9
    assert found["tiles"] > 3


def test_losses_and_gradients_are_those_of_one_device(found):
    assert len(found["meshes"]) == 10
    for name, mesh in found["meshes"].items():
        assert mesh["losses"] == pytest.approx(found["losses"], rel=2e-5), name
        assert mesh["gradient_error"] < 2e-4, (name, mesh["worst"])
    assert found["losses"][2] != pytest.approx(found["losses"][0], rel=1e-3)


def test_copies_of_the_model_reduce_their_gradients_once(found):
    """Two microbatches: inside their loop nothing as large as a weight is reduced."""
    once, in_a_loop = found["meshes"]["8x1x1"]["reductions"]
    assert once >= 0.9 * found["gradients"]  # without this nothing might have been recognized
    assert in_a_loop < found["largest_gradient"] / 8


def test_the_any_res_gather_needs_no_communication(found):
    counts = [mesh["gather_collectives"] for mesh in found["meshes"].values()]
    assert [count for count in counts if count is not None] == [0, 0, 0, 0]


OTHERS = {name: {"fusion": {"name": name}} for name in sorted(set(registry.STRATEGIES) - {"cli"})}
OTHERS["dpvr"] = {"fusion": {"name": "none"}, "routing": {"name": "dpvr", "saturation": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_every_strategy_trains_on_a_mesh_as_on_one_device(tmp_path, other):
    """Two copies, each split over two devices by width and over two by heads."""
    found = run_child(tmp_path, **other)
    (mesh,) = found["meshes"].values()
    assert mesh["losses"] == pytest.approx(found["losses"], rel=2e-5)
    assert mesh["gradient_error"] < 2e-4, mesh["worst"]
    assert found["losses"][2] != pytest.approx(found["losses"][0], rel=1e-3)
