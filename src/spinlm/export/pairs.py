"""Export the pairs of an iteration as preference data for TRL: the real response is chosen, the synthetic one rejected.

TRL takes text: it renders and tokenizes each message, and ends it with an end-of-turn token. A truncated response has
no end-of-turn token, so its pair is skipped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.export.player import require_empty
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, RecordFile, read_lines, read_pairs
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_path

EXPORT_SPLITS = {"train": "train", "heldout": "test"}
"""Names of the splits in the run folder and in the exported data set."""

ROWS_PER_WRITE = 1000


@dataclass(frozen=True)
class PairCounts:
    """How many pairs were exported, and how many skipped because the synthetic response was truncated."""

    iteration: int
    pairs: dict[str, int]  # by exported split
    truncated: int

    def __str__(self) -> str:
        counts = ", ".join(f"{pairs} {split}" for split, pairs in self.pairs.items())
        skipped = f"; {self.truncated} skipped, synthetic response truncated" if self.truncated else ""
        return f"pairs of iteration {self.iteration}: {counts}{skipped}"


def export_pairs(recipe: Recipe, folder: RunDir, iteration: int | None, output: Path) -> PairCounts:
    """Write the training and held-out pairs of an iteration as Parquet files for `datasets.load_dataset(output)`.

    The columns `prompt`, `chosen` and `rejected` are lists of messages.

    Args:
        recipe: the recipe of the run.
        folder: the run folder.
        iteration: the iteration; None for the newest that has pairs.
        output: a folder that does not exist or is empty.

    Raises:
        RunError: the output folder is not empty, the run is a control, or the iteration has no pairs yet.
    """
    require_empty(output)
    if recipe.is_control:
        raise RunError(f"{folder.root}: is supervised fine-tuning, which has no pairs")
    newest = _newest(folder)
    if iteration is None:
        iteration = newest
    if not folder.marker("reference_logprobs", iteration).exists():
        raise RunError(f"{folder.root}: iteration {iteration} has no pairs; the newest pairs are of iteration {newest}")
    folder.require("prepare", START)
    for source in range(max(0, iteration - recipe.selfplay.replay), iteration + 1):
        folder.require("generate", source)
    folder.require("reference_logprobs", iteration)
    pairs, truncated = {}, 0
    with atomic_path(output) as temporary:
        temporary.mkdir()
        for split, name in EXPORT_SPLITS.items():
            rows = _Rows(recipe, folder, iteration, split)
            pairs[name] = _write_parquet(temporary / f"{name}.parquet", rows)
            truncated += rows.truncated
    return PairCounts(iteration, pairs, truncated)


def _newest(folder: RunDir) -> int:
    """Return the last iteration that has pairs.

    Raises:
        RunError: no iteration has pairs.
    """
    complete = list(takewhile(lambda t: folder.marker("reference_logprobs", t).exists(), count()))
    if not complete:
        raise RunError(f"{folder.root}: has no pairs yet. `spinlm run` and `spinlm reference-logprobs` make them")
    return complete[-1]


class _Rows:
    """Iterate over the pairs of a split as rows of text, one shard at a time, and count the skipped ones."""

    def __init__(self, recipe: Recipe, folder: RunDir, iteration: int, split: str):
        self.folder, self.iteration, self.split = folder, iteration, split
        self.shard_size = recipe.opponent.shard_size
        self.examples = RecordFile(folder.examples(split), Example)
        self.truncated = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in range(self.examples.shards(self.shard_size)):
            examples = {example.id: example for example in self.examples.shard(shard, self.shard_size)}
            pairs = read_pairs([self.folder.pairs(self.iteration, self.split, shard)])
            keys = pairs.select(["id", "source_iteration", "sample"]).to_pylist()
            responses = {
                (response.iteration, response.id, response.sample): response
                for source in {key["source_iteration"] for key in keys}
                for response in read_lines(self.folder.generations(source, self.split, shard), Generation)
            }
            for key in keys:
                response = responses[key["source_iteration"], key["id"], key["sample"]]
                if not response.finished:
                    self.truncated += 1
                    continue
                example = examples[key["id"]]
                yield {
                    "id": example.id,
                    "source_iteration": response.iteration,
                    "sample": response.sample,
                    "prompt": example.messages,
                    "chosen": [{"role": "assistant", "content": example.response}],
                    "rejected": [{"role": "assistant", "content": response.text}],
                }


def _write_parquet(path: Path, rows: _Rows) -> int:
    """Write rows to a Parquet file and return their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("source_iteration", pa.int32()),
            ("sample", pa.int32()),
            *((column, messages) for column in ("prompt", "chosen", "rejected")),
        ]
    )
    written, iterator = 0, iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(iterator, ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            written += len(chunk)
    return written
