"""A checkpoint of another number of processes: refused, unless the data can go on from it."""

import os

import pytest
from test_checkpoint import Counter, read, write

from cli_jax.experiment import ConfigError
from cli_jax.train.checkpoint import FOLDER


class Binned(Counter):
    """Data whose order does not depend on the number of processes."""

    any_process_count = True


@pytest.fixture
def of_two(tmp_path):
    """A workdir with a checkpoint as two processes leave it."""
    write(tmp_path, [1])
    folder = tmp_path / FOLDER / "1"
    path = folder / "metadata" / "metadata"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    (folder / "data" / "process_0-of-1.json").rename(folder / "data" / "process_0-of-2.json")
    return tmp_path


def test_data_in_bins_goes_on_from_process_0(of_two):
    state, data = read(of_two, data=Binned(position=99))
    assert int(state.step) == 1
    assert data.position == 10


def test_data_that_is_packed_online_is_refused_with_the_remedy(of_two):
    data = Counter(position=99)
    with pytest.raises(ConfigError, match=r"written by 2 processes and there are 1.*data\.bins"):
        read(of_two, data=data)
    assert data.position == 99
    assert os.listdir(of_two / FOLDER) == ["1"]


def test_bins_of_other_settings_are_an_error_not_damage(of_two):
    with pytest.raises(ConfigError, match="workers was a and is b"):
        read(of_two, data=Binned(settings="b"))
    assert os.listdir(of_two / FOLDER) == ["1"]
