"""A trace of the updates that were asked for, and one line for a wrong request."""

import pytest

from cli_jax.experiment import ConfigError, LogConfig
from cli_jax.train import profile


def test_chosen_updates_are_traced(go, tmp_path, monkeypatch):
    events = []

    def noted(name):
        honest = getattr(profile.jax.profiler, name)
        monkeypatch.setattr(
            profile.jax.profiler, name, lambda *args: (events.append(name), honest(*args))
        )

    def around(step, state):
        events.append(step)
        return state

    noted("start_trace")
    noted("stop_trace")
    go(tmp_path, around=around, log=LogConfig(profile="2:4"))
    # A checkpoint is saved after update 3, so that it is finished before update 4 begins.
    assert events == [1, "start_trace", 2, 3, "stop_trace", 4, 5, 6, 7]
    (trace,) = (tmp_path / profile.FOLDER).rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"update" in content


def test_nothing_is_traced_unless_asked_for(go, tmp_path):
    go(tmp_path)
    assert not (tmp_path / profile.FOLDER).exists()


def test_an_interrupted_trace_is_written(go, tmp_path):
    def fail(step, state):
        if step == 4:
            raise ValueError("no update 4")
        return state

    with pytest.raises(ValueError, match="no update 4"):
        go(tmp_path, around=fail, log=LogConfig(profile="2:7"))
    assert list((tmp_path / profile.FOLDER).rglob("*.xplane.pb"))


@pytest.mark.parametrize("spec", ["3", "a:b", "4:4", "5:4", "0:2", "-1:2", "1:2:3", ":3", "3:"])
def test_a_wrong_request_is_one_line(spec):
    with pytest.raises(ConfigError, match=r"config.log.profile=.* 10:13 for") as error:
        profile.parse(spec, 100)
    assert repr(spec) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_request_behind_the_end_is_refused_before_anything_is_done(go, tmp_path):
    assert list(profile.parse("7:8", 7)) == [7]
    with pytest.raises(ConfigError, match=r"behind the last one: config.total_steps=7"):
        go(tmp_path, log=LogConfig(profile="7:9"))
    assert not (tmp_path / "checkpoints").exists()
