"""Rows on disk: both formats, their errors, and travelling to workers."""

import json
import pickle

import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from cli_jax.data import DataError, RowError, RowFile

json_rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.none()),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@given(rows=json_rows, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_rows_come_back_in_any_layout(tmp_path_factory, name, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("rows") / name
    if name == "rows.jsonl":
        text = "".join(f"{json.dumps(r, ensure_ascii=ascii_only)}\r\n\n" for r in rows)
    else:
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8"))
    file = RowFile(path)
    assert [file[i] for i in range(len(file))] == rows
    again = pickle.loads(pickle.dumps(file))
    assert again[len(rows) - 1] == rows[-1]


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf[{"id": 1}]')
    assert RowFile(path)[0] == {"id": 1}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '[{"id": 1},\n{"id": }]', r"a.json, line 2 \(byte 19\): not valid JSON: Expect"),
        ("a.json", '[{"id": 1}\n{"id": 2}]', r"line 2 \(byte 11\).*expected a comma"),
        ("a.json", '[{"id": 1},\n]', r"line 2 \(byte 12\).*a comma before the end"),
        ("a.json", '[{"id": 1}', r"byte 10\).*expected a comma or the end"),
        ("a.json", '[{"id": 1}] x', r"byte 12\).*text after the end"),
        ("a.json", '{"id": 1}', r"line 1 .*expected a list of rows .*jsonl"),
        ("a.jsonl", '{"id": 1}\n{"id": "é", 2}\n', r"a.jsonl, line 2 \(byte 23\): not valid JSON"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", "", "is empty"),
    ],
)
def test_broken_files_are_named_with_line_and_byte(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        RowFile(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing.json does not exist"):
        RowFile(tmp_path / "nothing.json")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = small.write(tmp_path, [small.row(0)])
    travelled = pickle.loads(pickle.dumps(RowFile(path)))
    small.write(tmp_path, [small.row(0), small.row(1)])
    with pytest.raises(DataError, match="has changed"):
        travelled[0]


def test_rows_that_are_no_mappings_are_bad_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"id": 1}, [2], {"id": "\xff"}]')
    file = RowFile(path)
    assert len(file) == 3
    with pytest.raises(RowError, match=r"not a mapping: \[2\]"):
        file[1]
    with pytest.raises(RowError, match="not UTF-8"):
        file[2]
    with pytest.raises(IndexError):
        file[3]
