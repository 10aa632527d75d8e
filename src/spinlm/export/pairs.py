"""Export the pairs of an iteration as preference data for TRL: the real response is chosen, the synthetic one rejected.

TRL takes text: it renders and tokenizes each message, and ends it with an end-of-turn token. A truncated response has
no end-of-turn token, so its pair is skipped.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
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


@dataclass(frozen=True)
class PairCounts:
    """How many pairs were exported, and why others were not."""

    iteration: int
    pairs: dict[str, int]  # by exported split
    skipped: Counter[str]  # by reason

    def __str__(self) -> str:
        counts = ", ".join(f"{pairs} {split}" for split, pairs in self.pairs.items())
        skipped = f"; skipped: {_counts(self.skipped)}" if self.skipped else ""
        return f"pairs of iteration {self.iteration}: {counts}{skipped}"


TRUNCATED, IDENTICAL = "synthetic response truncated", "synthetic response equal to the real one"
CORRECT = "synthetic response excluded as correct"
"""Why a pair is not exported."""


def _counts(skipped: Counter[str]) -> str:
    return ", ".join(f"{number} with the {reason}" for reason, number in skipped.items())


def export_pairs(recipe: Recipe, folder: RunDir, iteration: int | None, output: Path) -> PairCounts:
    """Write the training and held-out pairs of an iteration as Parquet files for `datasets.load_dataset(output)`.

    The columns `prompt`, `chosen` and `rejected` are lists of messages.

    Args:
        recipe: the recipe of the run.
        folder: the run folder.
        iteration: the iteration; None for the newest that has pairs.
        output: a folder that does not exist or is empty.

    Raises:
        RunError: the output folder is not empty, the run is a control, or the iteration has no pairs yet, or none to
            train on.
    """
    require_empty(output)
    if recipe.is_control:
        raise RunError(f"{folder.root}: is a control, which has no pairs")
    complete = list(takewhile(lambda t: folder.marker("reference_logprobs", t).exists(), count()))
    if not complete:
        raise RunError(f"{folder.root}: has no pairs yet. `spinlm run` and `spinlm reference-logprobs` make them")
    newest = complete[-1]
    iteration = newest if iteration is None else iteration
    if iteration not in complete:
        raise RunError(f"{folder.root}: iteration {iteration} has no pairs; the newest pairs are of iteration {newest}")
    folder.require("prepare", START)
    for source in range(max(0, iteration - recipe.selfplay.replay), iteration + 1):
        folder.require("generate", source)
    folder.require("reference_logprobs", iteration)
    counts: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    with atomic_path(output) as temporary:
        temporary.mkdir()
        for split, name in EXPORT_SPLITS.items():
            path = temporary / f"{name}.parquet"
            counts[name] = _write_split(recipe, folder, iteration, split, path, skipped)
            if split == "train" and not counts[name]:
                shutil.rmtree(temporary)
                excludes_correct = recipe.opponent.exclude_correct
                raise RunError(_no_pairs(folder, iteration, skipped, excludes_correct=excludes_correct))
            if not counts[name]:
                path.unlink()
    return PairCounts(iteration, counts, skipped)


def _no_pairs(folder: RunDir, iteration: int, skipped: Counter[str], *, excludes_correct: bool) -> str:
    """Say why an iteration has no training pairs to export."""
    rates = folder.metadata("reference_logprobs", iteration).get("train", {})
    kind, rate = (CORRECT, "correct_rate") if excludes_correct else (IDENTICAL, "identical_rate")
    skipped[kind] += round(rates.get(rate, 0) * rates.get("responses", 0))
    reason = f"{_counts(+skipped)} (of {rates.get('responses', 0)} responses)"
    remedy = "Train on prompts that the model does not answer perfectly yet, or sample at a higher temperature"
    if skipped[TRUNCATED] > skipped[kind]:
        remedy = "Raise opponent.max_new_tokens"
    return f"{folder.root}: iteration {iteration} has no pairs to export: {reason}. {remedy}"


def _write_split(recipe: Recipe, folder: RunDir, iteration: int, split: str, path: Path, skipped: Counter[str]) -> int:
    """Write the pairs of a split to a Parquet file, one shard at a time; count skipped pairs.

    Returns:
        The number of pairs written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(folder)
    examples, size = RecordFile(folder.examples(split), Example), recipe.opponent.shard_size
    written = 0
    with pq.ParquetWriter(path, schema) as writer:
        for shard in range(examples.num_shards(size)):
            pairs = read_pairs([folder.pairs(iteration, split, shard)])
            keys = [
                {name: row[name] for name in ("id", "source_iteration", "sample")}
                for row in pairs.to_pylist()
                if row["contrast"] and row["real_ids"] != row["synthetic_ids"]
            ]
            by_id = {example.id: example for example in examples.shard(shard, size)}
            rows = list(_rows(folder, split, shard, keys, by_id, skipped))
            if rows:  # `datasets` cannot read a file whose first row group is empty
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            written += len(rows)
    return written


def _schema(folder: RunDir) -> Any:
    """Return the columns of all splits. Tools, and other fields of messages, are among them if an example has them."""
    import pyarrow as pa

    fields = {"role": pa.string(), "content": pa.string()}
    tools: list[tuple[str, Any]] = []
    for split in EXPORT_SPLITS:
        for example in read_lines(folder.examples(split), Example):
            fields.update(dict.fromkeys((key for message in example.messages for key in message), pa.string()))
            tools = tools or ([("tools", pa.string())] if example.tools else [])
    messages = pa.list_(pa.struct(list(fields.items())))
    origin = [("id", pa.string()), ("source_iteration", pa.int32()), ("sample", pa.int32())]
    return pa.schema([*origin, *((column, messages) for column in ("prompt", "chosen", "rejected")), *tools])


def _rows(
    folder: RunDir,
    split: str,
    shard: int,
    keys: list[dict[str, Any]],
    examples: dict[str, Example],
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield the pairs of a shard as text. Skip and count pairs with a truncated response or equal texts."""
    responses = {
        (response.iteration, response.id, response.sample): response
        for source in {key["source_iteration"] for key in keys}
        for response in read_lines(folder.generations(source, split, shard), Generation)
    }
    for key in keys:
        example, response = examples[key["id"]], responses[key["source_iteration"], key["id"], key["sample"]]
        if not response.finished:
            skipped[TRUNCATED] += 1
        elif response.text == example.response:  # other tokens, same text
            skipped[IDENTICAL] += 1
        else:
            yield {
                **key,
                "prompt": example.messages,
                "chosen": [{"role": "assistant", "content": example.response}],
                "rejected": [{"role": "assistant", "content": response.text}],
                "tools": json.dumps(example.tools, ensure_ascii=False) if example.tools else None,
            }
