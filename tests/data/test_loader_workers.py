"""The pipeline with worker processes: the same samples, exact state, readable books."""

import json

import pytest
import small
from test_loader import answers, assert_equal, loader, take

from cli_jax.data.pipeline import report
from cli_jax.experiment import ConfigError


def test_two_workers_restore_exactly_and_keep_the_books(tmp_path):
    rows = [*small.mixed_rows(tmp_path, 11), small.row("bad", image="none.png")]
    data = small.config(small.write(tmp_path, rows), workers=2, augment=0.3, max_bad_share=0.5)
    first = loader(data)
    start = take(first, 3)  # an odd number: the other worker is next
    state = json.loads(json.dumps(first.get_state()))
    want = take(first, 3)
    told = report(first.get_state())
    first.close()
    second = loader(data)
    second.set_state(state)
    assert_equal(take(second, 3), want)
    assert report(second.get_state()) == told
    second.close()
    assert told["skipped"] == {"image": 1}
    assert told["rows"] == 12
    assert 0.5 < told["fill_tokens"] <= 1
    assert set(answers(start)) <= {str(i) for i in range(11)}

    alone = loader(small.config(data.train[0]))
    with pytest.raises(ConfigError, match=r"data\.workers was 2 and is 0"):
        alone.set_state(state)


def test_an_error_in_a_worker_arrives_as_what_it_is(tmp_path):
    path = small.write(tmp_path, small.mixed_rows(tmp_path, 6))
    data = small.config(path, workers=1, labels="reference")
    with pytest.raises(ConfigError, match=r"data.labels=answer_only"):
        take(loader(data, prompt_context=True), 9)
