"""Records and journals: what is written is read back."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlm.errors import RunError
from spinlm.rundir.records import (
    Example,
    Generation,
    HeldoutGreedy,
    HeldoutSampled,
    Journal,
    RecordFile,
    parse_line,
    read_lines,
    to_line,
)
from spinlm.utils.atomic import atomic_file

texts = st.text(st.characters(exclude_categories=["Cs"]))  # data with half a surrogate pair is refused earlier
numbers = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=3)
RECORDS = {
    Example: st.builds(Example, texts, messages, texts, ids, ids, texts, st.none() | ids),
    Generation: st.builds(
        Generation, texts, st.integers(0), st.integers(0), ids, texts, st.booleans(), st.none() | numbers
    ),
    HeldoutGreedy: st.builds(
        HeldoutGreedy,
        *(texts, ids, texts, st.booleans(), st.booleans(), numbers, numbers, st.none() | numbers),
        st.lists(numbers, max_size=3),
    ),
    HeldoutSampled: st.builds(HeldoutSampled, texts, ids, texts, st.booleans(), numbers, numbers, st.none() | numbers),
}


@pytest.mark.parametrize("kind", RECORDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_records_are_read_back(kind, data):
    """In order, by index, and by shard. Line separators inside a text do not end a line."""
    records = data.draw(st.lists(RECORDS[kind], max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        with atomic_file(path, "w") as file:
            file.writelines(to_line(record) for record in records)
        assert list(read_lines(path, kind)) == records
        by_number = RecordFile(path, kind)
        assert [by_number[number] for number in range(len(by_number))] == records
        size = data.draw(st.integers(1, 4))
        assert [
            record for shard in range(by_number.num_shards(size)) for record in by_number.shard(shard, size)
        ] == records


@given(record=RECORDS[Generation], share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_line_that_was_cut_off_is_refused(record, share):
    line = to_line(replace(record, text=record.text + "x")).rstrip("\n").encode()
    with pytest.raises(RunError, match=r"train\.jsonl, line 7: not a valid Generation"):
        parse_line(line[: int(len(line) * share)], Generation, Path("train.jsonl"), 7)


def test_journal_appends_and_reads_back(tmp_path):
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
def test_journal_removes_a_last_line_that_was_cut_off(tmp_path, torn):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n' + torn)
    journal = Journal(path)
    journal.add({"a": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 3}] == journal.records


@pytest.mark.parametrize("line", ['{"a": 2', ""])
def test_journal_names_a_damaged_line(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n' + line + '\n{"a": 3}\n')
    with pytest.raises(RunError, match=r"journal\.jsonl, line 2: "):
        Journal(path)


any_text = st.text(st.characters(exclude_categories=[]))  # with halves of surrogate pairs
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | any_text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3))


@given(st.lists(st.dictionaries(any_text, values, max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_journal_reads_back_any_json(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        Journal(path).add(*records)
        assert Journal(path).records == records
