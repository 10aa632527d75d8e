"""Reading record files a shard or a record at a time, so that a data set is never in memory at once."""

import itertools
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Generic

from spinlm.records import Record, read_line, read_lines


def shards(path: Path, kind: type[Record], size: int) -> Iterator[list[Record]]:
    """The records of a file, `size` at a time."""
    records = read_lines(path, kind)
    while shard := list(itertools.islice(records, size)):
        yield shard


def count_records(path: Path) -> int:
    """How many records a file holds."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def count_shards(path: Path, size: int) -> int:
    """How many shards `shards` yields."""
    return math.ceil(count_records(path) / size)


class RecordFile(Generic[Record]):
    """The records of a file by their number, each read when it is asked for."""

    def __init__(self, path: Path, kind: type[Record]):
        self.path = path
        self.kind: type[Record] = kind
        self._starts = array("q")  # in bytes
        start = 0
        with path.open("rb") as file:
            for line in file:
                self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        """Raises RunError where the line is not such a record."""
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        return read_line(line, self.kind, self.path, index + 1)
