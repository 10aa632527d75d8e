"""Reading record files a shard of examples at a time, so that a data set is never in memory at once."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from spinlm.records import Record, read_lines


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
