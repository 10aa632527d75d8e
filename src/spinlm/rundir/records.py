"""Records in a run folder, and their file formats.

Examples, generations and held-out responses are JSON lines, which people can read. Pairs are an Arrow stream, which
training reads from disk without making Python objects; `datasets.Dataset.from_file` opens one. A journal is a
JSON-lines file that grows record by record.
"""

import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from spinlm.errors import RunError
from spinlm.utils.atomic import read_json_lines

Message = dict[str, Any]
"""A message of a conversation: role, content, and other fields that a chat template renders."""

SPLITS = ("heldout", "sft", "train")
"""The splits of a run's examples, in the order in which they are drawn."""

PAIR_SPLITS = ("train", "heldout")
"""The splits whose responses make pairs."""


def response_splits(*, is_control: bool) -> tuple[str, ...]:
    """Return the splits that the opponent responds to. A control does not train on responses: held-out prompts only."""
    return ("heldout",) if is_control else PAIR_SPLITS


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its human-written response, rendered and tokenized."""

    id: str
    messages: list[Message]  # the prompt: everything before the response
    response: str  # as rendered; `Generation.text` is made in the same way
    prompt_ids: list[int]  # exactly what the opponent sees
    response_ids: list[int]  # with the end-of-turn token, unless it was cut at the length limit
    source: str  # file and row, for messages
    rejected_ids: list[int] | None = None  # the rejected response of preference data
    tools: list[Any] | None = None  # tool schemas, which the chat template writes into the prompt


@dataclass(frozen=True, slots=True)
class Generation:
    """An opponent's response to the prompt of an example."""

    id: str  # of the example
    iteration: int
    sample: int
    token_ids: list[int]  # with the end-of-turn token, if the response ended
    text: str
    finished: bool  # ended by an end-of-turn token, not by the length limit
    logprob: float | None  # sum over tokens, by the sampler; None if the engine gives none


@dataclass(frozen=True, slots=True)
class Pair:
    """A real and a synthetic response to one prompt, with the opponent's log-probabilities of both.

    In a row without contrast, only the NLL term of the real response counts, and all log-probabilities are NaN.
    """

    id: str  # of the example
    source_iteration: int  # the iteration whose opponent wrote the synthetic response
    sample: int
    prompt_ids: list[int]
    real_ids: list[int]
    synthetic_ids: list[int]
    opponent_real: float  # log p_θt(y|x), sum over tokens
    opponent_synthetic: float  # log p_θt(y'|x), sum over tokens
    initial_ids: list[int] | None = None  # θ_0's response y₀, if the objective uses it
    start_real: float | None = None  # log p_θ0(y|x), if the reference is a mixture with θ_0
    start_synthetic: float | None = None  # log p_θ0(y'|x), likewise
    contrast: bool = True  # whether the loss compares the two responses


@dataclass(frozen=True, slots=True)
class HeldoutGreedy:
    """A player's greedy response to a held-out prompt, with its metrics."""

    id: str  # of the example
    token_ids: list[int]
    text: str
    finished: bool
    identical: bool  # equal to the real response, token for token
    repeated_4grams: float  # share of 4-grams of tokens that occurred earlier in the response
    nll: float  # of the real response, in nats per token
    task_score: float | None  # from 0 to 1, if the recipe names a scorer
    margins: list[float] = field(default_factory=list)  # real response over opponent's, in nats


@dataclass(frozen=True, slots=True)
class HeldoutSampled:
    """A player's response to a held-out prompt, sampled at temperature 1 from all tokens."""

    id: str  # of the example
    token_ids: list[int]
    text: str
    finished: bool
    logprob: float  # sum over tokens, under the player
    start_logprob: float  # sum over tokens, under θ_0
    task_score: float | None  # from 0 to 1, if the recipe names a scorer


@dataclass(frozen=True, slots=True)
class HeldoutAtTemperature:
    """A player's response to a held-out prompt, sampled at one of `evaluate.temperatures` from all tokens."""

    id: str  # of the example
    temperature: float
    token_ids: list[int]
    text: str
    finished: bool
    task_score: float  # from 0 to 1


Record = TypeVar("Record", Example, Generation, HeldoutGreedy, HeldoutSampled, HeldoutAtTemperature)


def to_line(record: Example | Generation | HeldoutGreedy | HeldoutSampled | HeldoutAtTemperature) -> str:
    """Encode a record as one line of JSON."""
    return json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":")) + "\n"


def read_lines(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Read records of one kind from a JSON-lines file that spinlm wrote.

    Raises:
        RunError: a line is not such a record, because the file was cut off or edited.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield parse_line(line, kind, path, number)


def parse_line(line: bytes, kind: type[Record], path: Path, number: int) -> Record:
    """Decode one line of a file.

    Raises:
        RunError: the line is not such a record, because the file was cut off or edited.
    """
    try:
        return kind(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path}, line {number}: not a valid {kind.__name__} ({error}). The file was changed after it was written. "
            "Delete it and the markers of its iteration (.spinlm/*/*.done), then run again"
        ) from error


def count_records(path: Path) -> int:
    """Return the number of records in a JSON-lines file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


class RecordFile(Generic[Record]):
    """Random access to the records of a JSON-lines file, without holding them in memory."""

    def __init__(self, path: Path, kind: type[Record]):
        self.path = path
        self.kind: type[Record] = kind
        self._offsets = array("q")  # of each line, in bytes
        offset = 0
        with path.open("rb") as file:
            for line in file:
                self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises RunError if the line is not such a record."""
        return self._read(index, index + 1)[0]

    def num_shards(self, size: int) -> int:
        """Return the number of shards of `size` records; the last shard may be smaller."""
        return math.ceil(len(self) / size)

    def shard(self, number: int, size: int) -> list[Record]:
        """Read the records of one shard."""
        return self._read(number * size, min((number + 1) * size, len(self)))

    def _read(self, first: int, end: int) -> list[Record]:
        with self.path.open("rb") as file:
            file.seek(self._offsets[first])
            return [parse_line(file.readline(), self.kind, self.path, index + 1) for index in range(first, end)]


class Journal:
    """A JSON-lines file that grows. If the process dies, at most the records being added are lost.

    `records` holds what the file holds. Opening a journal removes a last line that was cut off.

    Raises:
        RunError: another line is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self.records = list(read_json_lines(path))

    def add(self, *records: dict[str, Any]) -> None:
        """Append records and write them to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        self.records += records


def _pair_schema() -> Any:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("id", pa.string()),
            ("source_iteration", pa.int32()),
            ("sample", pa.int32()),
            ("prompt_ids", ids),
            ("real_ids", ids),
            ("synthetic_ids", ids),
            ("opponent_real", pa.float64()),
            ("opponent_synthetic", pa.float64()),
            ("initial_ids", ids),
            ("start_real", pa.float64()),
            ("start_synthetic", pa.float64()),
            ("contrast", pa.bool_()),
        ]
    )


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as an Arrow stream."""
    import pyarrow as pa

    schema = _pair_schema()
    table = pa.Table.from_pylist([asdict(pair) for pair in pairs], schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)


def read_pairs(paths: Iterable[Path]) -> Any:
    """Open pair files as one memory-mapped Arrow table (columns as in `Pair`).

    Raises:
        RunError: a file is not a complete Arrow stream.
    """
    import pyarrow as pa

    tables = []
    for path in paths:
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                tables.append(reader.read_all())
        except (pa.ArrowInvalid, OSError) as error:
            raise RunError(
                f"{path}: not a readable pair file ({error}). Delete it and the marker reference_logprobs.done of its "
                "iteration in .spinlm, then run again"
            ) from error
    return pa.concat_tables(tables) if tables else _pair_schema().empty_table()
