"""SampleFeatures record files a shard or a record at a time, so that a data set is never in memory at once."""

import math
from array import array
from pathlib import Path
from typing import Generic

from spinlm.rundir.records import Record, read_line


def count_records(path: Path) -> int:
    """How many records a file holds."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def count_shards(path: Path, size: int) -> int:
    """How many shards of so many records a file holds; the last one may be smaller."""
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
        return self._read(index, index + 1)[0]

    def shards(self, size: int) -> int:
        """How many shards of so many records there are; the last one may be smaller."""
        return math.ceil(len(self) / size)

    def shard(self, number: int, size: int) -> list[Record]:
        """The records of a shard."""
        return self._read(number * size, min((number + 1) * size, len(self)))

    def _read(self, begin: int, end: int) -> list[Record]:
        with self.path.open("rb") as file:
            file.seek(self._starts[begin])
            return [read_line(file.readline(), self.kind, self.path, index + 1) for index in range(begin, end)]
