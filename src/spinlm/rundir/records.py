"""The things that are written to a run folder: what they hold, and how they are stored.

Examples and generations are JSON lines, one record a line, so that a person can read them. Pairs are an Arrow stream,
so that training reads them from disk without holding them as Python objects; `datasets.Dataset.from_file` opens one.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from spinlm.errors import RunError

Message = dict[str, str]

SPLITS = ("heldout", "sft", "train")
"""The splits of a run's examples, in the order in which they are drawn."""

PAIR_SPLITS = ("train", "heldout")
"""The splits that the opponent responds to."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the human-written response to it, rendered and tokenised once."""

    id: str
    messages: list[Message]  # the prompt: everything before the response
    response: str
    prompt_ids: list[int]  # exactly what the opponent sees
    response_ids: list[int]  # ends with the end-of-turn token, unless it was cut at the length limit
    source: str  # file and row, for messages to the user
    rejected_ids: list[int] | None = None  # a worse response, where the data are preferences


@dataclass(frozen=True, slots=True)
class Generation:
    """One response an opponent gave to the prompt of an example."""

    id: str  # the example's
    iteration: int
    sample: int
    token_ids: list[int]  # with the end-of-turn token if there was one
    text: str
    finished: bool  # ended by an end-of-turn token, not by the limit
    logprob: float | None  # sum over tokens, as the sampler saw it; None where it does not say, or the data gave it
    retokenised: bool = False  # the engine gave text, which may have had other tokens


@dataclass(frozen=True, slots=True)
class Pair:
    """A real and a synthetic response to one prompt, with the opponent's log-probabilities of both."""

    id: str  # the example's
    source_iteration: int  # the iteration whose opponent wrote the synthetic response
    sample: int
    prompt_ids: list[int]
    real_ids: list[int]
    synthetic_ids: list[int]
    opponent_real: float  # log p_θt(y|x), sum over tokens
    opponent_synthetic: float  # log p_θt(y'|x), sum over tokens
    initial_ids: list[int] | None = None  # θ_0's response y₀, where the objective asks for it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an opponent answers. One record for every engine."""

    temperature: float
    top_p: float
    max_new_tokens: int
    max_length: int  # prompt and response together
    samples: int
    stop_ids: tuple[int, ...]  # any of these ends a response


@dataclass(frozen=True, slots=True)
class HeldoutGreedy:
    """A player's answer to a held-out prompt, and what was measured on that prompt."""

    id: str  # the example's
    token_ids: list[int]
    text: str
    finished: bool
    identical: bool  # token for token the real response
    repeated_4grams: float  # share of its 4-grams of tokens that occurred before in it
    nll: float  # of the real response, nats per token
    task_score: float | None  # from 0 to 1, where the recipe names a scorer
    margins: list[float] = field(default_factory=list)  # of the real response over the opponent's, in nats


@dataclass(frozen=True, slots=True)
class HeldoutSampled:
    """A response to a held-out prompt from a player's own distribution (temperature 1, all tokens)."""

    id: str  # the example's
    token_ids: list[int]
    text: str
    finished: bool
    logprob: float  # sum over tokens under the player itself
    start_logprob: float  # and under θ_0
    task_score: float | None  # from 0 to 1, where the recipe names a scorer


Record = TypeVar("Record", Example, Generation, HeldoutGreedy, HeldoutSampled)


def to_line(record: Example | Generation | HeldoutGreedy | HeldoutSampled) -> str:
    """One record as one line of JSON."""
    return json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":")) + "\n"


def read_lines(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Read records of one kind from a JSON-lines file this program wrote.

    Raises:
        RunError: a line is not such a record (the file was cut off or edited).
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield read_line(line, kind, path, number)


def read_line(line: bytes, kind: type[Record], path: Path, number: int) -> Record:
    """The record on a line of a file.

    Raises:
        RunError: it is not such a record (the file was cut off or edited).
    """
    try:
        return kind(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path}, line {number}: not a valid {kind.__name__} ({error}). The file was damaged after it was "
            "written; delete it and the markers (*.done) of its iteration, then run again"
        ) from error


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
        RunError: a file is not a complete Arrow stream, or there are more files than a process can map.
    """
    import pyarrow as pa

    tables = []
    for path in paths:
        try:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
                tables.append(reader.read_all())
        except (pa.ArrowInvalid, OSError) as error:
            if os.strerror(errno.ENOMEM) in str(error):  # Arrow gives no number
                raise RunError(
                    f"{path}: cannot be mapped beside {len(tables)} others: the system allows a process no more. Raise "
                    "vm.max_map_count, or run with a larger opponent.shard_size in another --run-dir"
                ) from error
            raise RunError(
                f"{path}: not a readable pair file ({error}). Delete it and reference_logprobs.done beside it, then run again"
            ) from error
    # A shard of an older version lacks the newest column; null there.
    return pa.concat_tables(tables, promote_options="default") if tables else _pair_schema().empty_table()
