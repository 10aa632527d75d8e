import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlm.errors import RunError
from spinlm.rundir.journal import Journal


def test_records_are_added_and_read_again(tmp_path):
    path = tmp_path / "folder" / "journal.jsonl"
    journal = Journal(path)
    assert journal.records == []
    assert not path.exists()
    journal.add({"a": 1}, {"a": "ü\u2028\n"})
    journal.add({"a": 3})
    assert [record["a"] for record in journal.records] == [1, "ü\u2028\n", 3]
    assert Journal(path).records == journal.records
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("torn", ['{"a": 2', '{"a": 2}', "\x00\x00"])
def test_a_line_that_was_cut_off_is_removed(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    journal = Journal(path)
    journal.add({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 3}] == journal.records


@pytest.mark.parametrize("line", ['{"a": 2', "[]", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n' + line + '\n{"a": 3}\n')
    with pytest.raises(RunError, match=r"journal\.jsonl, line 2: .*Delete the line, and run again"):
        Journal(path)


texts = st.text(st.characters(exclude_categories=[]))  # halves of characters, too
numbers = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(numbers, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@given(st.lists(st.dictionaries(texts, values, max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_whatever_is_added_is_read_again(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        Journal(path).add(*records)
        assert Journal(path).records == records
