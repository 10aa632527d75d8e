"""Preferences: the pairs of an iteration as data for other trainers, the real response chosen and the synthetic one
rejected.

As text, since that is what these trainers take: they render and tokenise it once more, and end every response with an
end-of-turn token. A response that did not end has none, so its pair is left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

from spinlm.errors import RunError
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, Generation, RecordFile, read_lines, read_pairs
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import atomic_path, write_json

SPLITS = {"train": "train", "heldout": "test"}
"""What a split is called outside."""


@dataclass(frozen=True)
class Written:
    """How many pairs were written, and how many left out because the synthetic response did not end."""

    iteration: int
    pairs: dict[str, int]  # by split, as it is called outside
    unfinished: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {split}" for split, count in self.pairs.items())
        left_out = f"; {self.unfinished} left out, whose synthetic response did not end" if self.unfinished else ""
        return f"pairs of iteration {self.iteration}: {counts}{left_out}"


def export_pairs(recipe: Recipe, run: RunDir, iteration: int | None, to: Path, form: str) -> Written:
    """Write the pairs that an iteration trains on, and its held-out ones, to a folder.

    Args:
        recipe: the run's.
        run: where from.
        iteration: whose pairs; None for the newest.
        to: a folder that is not there, or empty.
        form: `trl`: Parquet files that `datasets.load_dataset(folder)` opens, with `prompt`, `chosen` and `rejected` as
            messages. `llama-factory`: JSON files in the same words, and the dataset_info.json that describes them.

    Raises:
        RunError: the folder is not empty, the run is a control that has no pairs, or the iteration has none yet.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to}: already there and not an empty folder. Choose another --output")
    if recipe.is_control:
        raise RunError(f"{run.root}: is supervised fine-tuning, which trains on no pairs")
    newest = _newest(run)
    if iteration is None:
        iteration = newest
    if not run.marker("reference_logprobs", iteration).exists():
        raise RunError(f"{run.root}: iteration {iteration} has no pairs; the newest are those of iteration {newest}")
    run.require("prepare", START)
    for source in range(max(0, iteration - recipe.selfplay.replay), iteration + 1):
        run.require("generate", source)
    run.require("reference_logprobs", iteration)
    write = {"trl": _write_parquet, "llama-factory": _write_json}[form]
    counts, unfinished = {}, 0
    with atomic_path(to) as folder:
        folder.mkdir()
        for split, name in SPLITS.items():
            rows = _Rows(recipe, run, iteration, split)
            counts[name] = write(folder, name, rows)
            unfinished += rows.unfinished
        if form == "llama-factory":
            write_json(folder / "dataset_info.json", {f"spin_{name}": _described(name) for name in SPLITS.values()})
    return Written(iteration, counts, unfinished)


def _newest(run: RunDir) -> int:
    """The last iteration that has pairs.

    Raises:
        RunError: there is none.
    """
    scored = list(takewhile(lambda iteration: run.marker("reference_logprobs", iteration).exists(), count()))
    if not scored:
        raise RunError(f"{run.root}: has no pairs yet: `spinlm reference-logprobs` makes them, as `spinlm run` does")
    return scored[-1]


class _Rows:
    """The pairs of a split as text, a shard at a time; what was left out is counted on the way."""

    def __init__(self, recipe: Recipe, run: RunDir, iteration: int, split: str):
        self.run, self.iteration, self.split = run, iteration, split
        self.size = recipe.opponent.shard_size
        self.examples = RecordFile(run.examples(split), Example)
        self.unfinished = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in range(self.examples.shards(self.size)):
            examples = {example.id: example for example in self.examples.shard(shard, self.size)}
            pairs = read_pairs([self.run.pairs(self.iteration, self.split, shard)])
            keys = pairs.select(["id", "source_iteration", "sample"]).to_pylist()
            answers = {
                (answer.iteration, answer.id, answer.sample): answer
                for source in {key["source_iteration"] for key in keys}
                for answer in read_lines(self.run.generations(source, self.split, shard), Generation)
            }
            for key in keys:
                answer = answers[key["source_iteration"], key["id"], key["sample"]]
                if not answer.finished:
                    self.unfinished += 1
                    continue
                example = examples[key["id"]]
                yield {
                    "id": example.id,
                    "source_iteration": answer.iteration,
                    "sample": answer.sample,
                    "prompt": example.messages,
                    "chosen": [{"role": "assistant", "content": example.response}],
                    "rejected": [{"role": "assistant", "content": answer.text}],
                }


ROWS_AT_ONCE = 1000


def _write_parquet(folder: Path, name: str, rows: _Rows) -> int:
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
    written, waiting = 0, iter(rows)
    with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
        while chunk := list(islice(waiting, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
            written += len(chunk)
    return written


def _write_json(folder: Path, name: str, rows: _Rows) -> int:
    written = 0
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            line = {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            written += 1
    return written


def _described(name: str) -> dict[str, Any]:
    """LLaMA-Factory's description of a file of preferences in the words of chat messages."""
    return {
        "file_name": f"{name}.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
