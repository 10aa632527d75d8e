"""Records as lines of a file: whatever they hold comes back."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinlm.errors import RunError
from spinlm.rundir.records import Example, Generation, HeldoutGreedy, HeldoutSampled, read_line, read_lines, to_line
from spinlm.rundir.shards import RecordFile
from spinlm.utils.atomic import atomic_file

texts = st.text(st.characters(exclude_categories=["Cs"]))  # data with half a character is refused before
numbers = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
messages = st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), max_size=3)
RECORDS = {
    Example: st.builds(Example, texts, messages, texts, ids, ids, texts, st.none() | ids),
    Generation: st.builds(
        Generation, texts, st.integers(0), st.integers(0), ids, texts, st.booleans(), st.none() | numbers, st.booleans()
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
def test_whatever_a_record_holds_is_read_again(kind, data):
    """One after the other, by its number, and a shard at a time; ends of lines in a text end no line."""
    records = data.draw(st.lists(RECORDS[kind], max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        with atomic_file(path, "w") as file:
            file.writelines(to_line(record) for record in records)
        assert list(read_lines(path, kind)) == records
        by_number = RecordFile(path, kind)
        assert [by_number[number] for number in range(len(by_number))] == records
        size = data.draw(st.integers(1, 4))
        assert [record for shard in range(by_number.shards(size)) for record in by_number.shard(shard, size)] == records


@given(record=RECORDS[Generation], share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_line_that_was_cut_is_refused(record, share):
    line = to_line(replace(record, text=record.text + "x")).rstrip("\n").encode()
    with pytest.raises(RunError, match=r"train\.jsonl, line 7: not a valid Generation"):
        read_line(line[: int(len(line) * share)], Generation, Path("train.jsonl"), 7)
