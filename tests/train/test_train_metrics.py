import json
import os

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from cli_jax.train.metrics import FILE, MetricsLog, forget_after
from cli_jax.train.workdir import WorkdirError, read_lines


def values(step: int) -> dict[str, float]:
    return {"loss": 10.0 - step, "lr": 0.1, "tokens": 100.0, "images": 2.0}


def write(folder, steps, every=1, total=100):
    log = MetricsLog(epath.Path(folder), steps.start - 1, total, every)
    for step in steps:
        log.done(step, values(step))
    log.close()


def events(folder):
    """The events of a folder's files, oldest first, in TensorBoard's record format."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents*"), key=os.path.getmtime):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def test_lines_and_scalars_hold_the_metrics(tmp_path):
    write(tmp_path, range(1, 8), every=3, total=7)
    lines = read_lines(tmp_path / FILE)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line["loss"] for line in lines] == [7.0, 4.0, 3.0]
    for line, steps in zip(lines, (3, 3, 1), strict=True):
        # Both speeds are over the same time, in which `steps` updates were done.
        assert line["tokens_per_second"] / line["images_per_second"] == pytest.approx(50)
        assert line["images_per_second"] > 2 * steps / 60
    scalars = [
        (event.step, event.summary.value[0].simple_value)
        for event in events(tmp_path)
        if event.summary.value and event.summary.value[0].tag == "train/loss"
    ]
    assert scalars == [(3, 7.0), (6, 4.0), (7, 3.0)]


def test_the_bar_shows_loss_rate_speeds_and_time_left(tmp_path, capfd):
    write(tmp_path, range(1, 6), total=10)
    shown = capfd.readouterr().err.split("\r")[-1]
    for part in ("5/10", "loss 5.0000", "lr 1.00e-01", "tokens/s", "images/s", "<"):
        assert part in shown


def test_a_run_that_goes_on_rewrites_the_lines_of_the_steps_done_again(tmp_path):
    write(tmp_path, range(1, 6))
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    write(tmp_path, range(4, 9))
    assert [line["step"] for line in read_lines(tmp_path / FILE)] == list(range(1, 9))
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 4]  # TensorBoard hides what came before from there on


def test_forgetting_keeps_earlier_lines_as_they_are(tmp_path):
    forget_after(epath.Path(tmp_path), 3)
    assert not (tmp_path / FILE).exists()
    write(tmp_path, range(1, 6))
    before = (tmp_path / FILE).read_text().splitlines()
    forget_after(epath.Path(tmp_path), 3)
    assert (tmp_path / FILE).read_text().splitlines() == before[:3]
    assert json.loads(before[2])["step"] == 3


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    log = MetricsLog(epath.Path(tmp_path), 0, 10, 1)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115 (closed by the log)
    with pytest.raises(WorkdirError, match=rf"{FILE}: No space left on device. Free some space"):
        log.done(1, values(1))
    log.close()
