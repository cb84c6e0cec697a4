"""The books: what counts once, what stops a run, and that they survive a checkpoint."""

import json
import logging

import pytest

from cli_jax.data import DataError, Sizes
from cli_jax.data.ledger import Drop, Ledger, Tally, report

SIZES = Sizes(rows=2, length=10, visual=5, tiles=4, images=2, tile_size=8, patches=4)


def ledger(**changes):
    limits = {"max_bad_share": 0.5, "strict": False} | changes
    return Ledger(["a.json", "b.json"], [(0, 4), (10, 30)], SIZES, **limits)


def drop(source, row, too_long=False):
    kind = "tiles" if too_long else "image"
    return Drop(source, row, f"id{row}", too_long, kind, f"reason {row}")


def test_sums_shares_and_epochs():
    books = ledger()
    books.add(Tally([4, 10], [4, 9], [drop(1, 12)], rows=2, tokens=15, visual=5, tiles=2))
    books.add(Tally([2, 0], [2, 0], [], rows=2, tokens=5, visual=0, tiles=4))
    assert report({"ledger": books.state()}) == {
        "drawn": 16,
        "used": 15,
        "skipped_rows": 1,
        "skipped": {"image": 1},
        "too_long_rows": 0,
        "too_long": {},
        "rows": 4,
        "fill_tokens": 0.5,
        "fill_visual": 0.25,
        "fill_tiles": 0.375,
        "epochs": {"a.json": 1.5, "b.json": 0.5},
        "first": ["b.json: row 12 (id 'id12'): reason 12"],
    }
    assert report({"ledger": ledger().state()})["fill_tokens"] == 0


def test_a_row_counts_and_is_logged_once(caplog):
    books = ledger()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            books.add(Tally([2, 2], [1, 1], [drop(0, 1), drop(1, 29, too_long=True)]))
    told = report({"ledger": books.state()})
    assert (told["skipped"], told["too_long"]) == ({"image": 1}, {"tiles": 1})
    assert told["drawn"] == 12
    messages = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert messages == [
        ("WARNING", "a.json: row 1 (id 'id1') skipped: reason 1"),
        ("INFO", "b.json: row 29 (id 'id29') is too long: reason 29"),
    ]


def test_too_many_bad_rows_of_one_source_stop_the_run():
    books = ledger()
    books.add(Tally([3, 3], [1, 3], [drop(0, 0), drop(0, 3)]))  # exactly the share: allowed
    with pytest.raises(DataError, match=r"a.json: 3 of 4 rows .*max_bad_share = 0.5") as caught:
        books.add(Tally([1, 0], [0, 0], [drop(0, 2)]))
    for row in (0, 3, 2):
        assert f"row {row} (id 'id{row}'): reason {row}" in str(caught.value)


def test_a_process_that_draws_a_share_of_the_rows_counts_against_that_share():
    books = ledger(processes=2)  # of the 20 rows of b.json it draws 10
    books.add(Tally([0, 5], [0, 0], [drop(1, 10 + 2 * i) for i in range(5)]))
    with pytest.raises(DataError, match=r"b.json: 6 of 10 rows cannot be used"):
        books.add(Tally([0, 1], [0, 0], [drop(1, 20)]))
    later = ledger(processes=2)  # a later epoch draws the others, too
    later.add(Tally([0, 20], [0, 14], [drop(1, 10 + i) for i in range(6)]))


def test_long_rows_are_no_bad_rows():
    books = ledger(max_bad_share=0.0, strict=True)
    books.add(Tally([3, 0], [1, 0], [drop(0, 0, True), drop(0, 1, True)]))
    assert report({"ledger": books.state()})["too_long_rows"] == 2


def test_a_source_without_a_usable_row_stops_the_run():
    books = ledger()
    long = [drop(0, i, True) for i in range(4)]
    books.add(Tally([3, 0], [0, 0], long[:3]))
    with pytest.raises(DataError, match=r"a.json: none of the first 4 rows drawn can be used"):
        books.add(Tally([1, 0], [0, 0], long[3:]))


def test_strict_stops_at_the_first_bad_row():
    with pytest.raises(DataError, match=r"b.json: row 11 .*reason 11 \(data.strict is set\)"):
        ledger(strict=True).add(Tally([0, 9], [0, 7], [drop(1, 11), drop(1, 12)]))


def test_the_books_survive_json(caplog):
    books = ledger()
    books.add(Tally([4, 9], [3, 8], [drop(0, 1), drop(1, 20, True)], rows=2, tokens=9))
    again = ledger()
    again.load(json.loads(json.dumps(books.state())))
    assert again.state() == books.state()
    later = Tally([4, 9], [3, 7], [drop(0, 1), drop(1, 20, True), drop(1, 21)], rows=2)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again.add(later)
    assert len(caplog.records) == 1  # only row 21 is new
    books.add(later)
    assert again.state() == books.state()
