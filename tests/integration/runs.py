"""A tiny recipe with its data, and helpers to read run folders."""

import contextlib
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinlm.recipe.load import as_yaml
from spinlm.rundir.layout import RunDir
from spinlm.rundir.markers import VOLATILE_KEYS
from spinlm.rundir.provenance import read_recipe
from spinlm.rundir.stage_graph import START
from spinlm.utils.atomic import short_digest

RECIPE = """\
# a tiny recipe
model: {path: model}
lora: {r: 4, alpha: 8, dropout: 0.1}
data: {path: data.jsonl, prompts: 24, heldout: 10}
sft: {epochs: 3, learning_rate: 2e-2, batch_size: 4}
opponent: {max_new_tokens: 6, shard_size: 4, batch_size: 4, temperature: 0.4}
selfplay: {iterations: 2, guard: null}
train:
  {epochs: 2, batch_size: 4, learning_rate: 2e-3, optimizer: adamw, max_length: 64, tokens_per_micro_batch: 128,
   save_steps: 5}
evaluate: {scorer: exact_match}
"""
PROMPTS, HELDOUT, ITERATIONS, SAVE_STEPS, SHARDS = 24, 10, 2, 5, 6


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a JSON-lines file. A row that is text is written unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows() -> list[dict[str, str]]:
    """48 rows; twelve of them repeat another row's prompt with another response."""
    responses = ("Paris", "Yes", "red", "three")
    first = [{"prompt": f"What is {n}?", "response": responses[n % 4]} for n in range(36)]
    return first + [{"prompt": f"What is {n}?", "response": "green"} for n in range(0, 36, 3)]


@dataclass(frozen=True)
class World:
    """A user's folder: a model, data and a recipe."""

    folder: Path
    recipe: Path
    model: Path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_jsons(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The records of all files that match, in order."""
    return [row for path in sorted(folder.glob(pattern)) for row in read_rows(path)]


def read_pairs(run: Path, iteration: int, split: str) -> list[dict[str, Any]]:
    import datasets

    files = sorted((run / f"iteration-{iteration}" / "pairs").glob(f"{split}-*.arrow"))
    return [dict(row) for file in files for row in datasets.Dataset.from_file(str(file))]


def readme_command(where: str) -> list[str]:
    """The command for a kind of machine in the README's table."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if line.startswith(f"| {where}"))
    return shlex.split(line.split("`")[1])


def steps(run: Path) -> list[dict[str, Any]]:
    """The complete lines of train_log.jsonl."""
    path = run / "train_log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def change_recipe(run: Path, **changes: dict[str, Any]) -> None:
    """Change values of a run's recipe, as if the run had begun with them."""
    folder = RunDir(run)
    recipe = read_recipe(folder)
    for section, values in changes.items():
        recipe[section] |= values
    folder.recipe.write_text(as_yaml(recipe), encoding="utf-8")
    folder.record_digest(folder.recipe)


def change_marker(path: Path, **values: Any) -> None:
    """Give a marker other values, as if its stage had written them."""
    changed = without(json.loads(path.read_text(encoding="utf-8")), "sum") | values
    path.write_text(json.dumps(changed | {"sum": short_digest(changed)}), encoding="utf-8")


def rewrite_markers(run: Path) -> None:
    """Rewrite all markers so that they match the files in the run folder."""
    folder = RunDir(run)
    players = [("prepare", START), ("sft", START), ("evaluate", START)]
    stages = ("generate", "reference_logprobs", "regime", "train", "evaluate", "promote")
    for stage, iteration in [*players, *((stage, iteration) for iteration in range(ITERATIONS) for stage in stages)]:
        if (marker := folder.marker(stage, iteration)).exists():
            marker_values = json.loads(marker.read_text(encoding="utf-8"))
            outputs = [run / name for name in marker_values["outputs"]]
            folder.complete(
                stage, iteration, outputs, **without(marker_values, "made_from", "digest", "outputs", "sum")
            )


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def contents(run: Path) -> dict[str, str]:
    """Digest of every file of a run, without values that depend on the clock or the process."""
    digests = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink():
            digests[name] = f"-> {path.readlink()}"
        elif path.suffix == ".done":
            digests[name] = json.dumps(without(json.loads(path.read_text(encoding="utf-8")), *VOLATILE_KEYS))
        elif path.is_file() and name not in (".spinlm/lock", "provenance.json", "train_log.jsonl", "error.txt"):
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    timeless = [without(line, "tokens_per_second") for line in steps(run)]
    return digests | {"train_log.jsonl": json.dumps(timeless)}


def assert_whole(run: Path) -> None:
    """Every file with its final name is complete."""
    from safetensors.torch import load_file

    for path in run.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(run).parts if part != ".spinlm"):
            continue
        if path.suffix == ".jsonl":
            text = path.read_text(encoding="utf-8")
            assert not text or text.endswith("\n"), path
            read_rows(path)
        elif path.suffix in (".json", ".done"):
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".arrow":
            import datasets

            datasets.Dataset.from_file(str(path))


def held_by(run: Path, pid: int) -> bool:
    """Whether a process holds the run folder."""
    return RunDir(run).lock_owner().startswith(f"pid {pid} on ")


@contextlib.contextmanager
def fifo(path: Path) -> Iterator[Path]:
    """Make a pipe without a reader: a process that opens it for writing waits until it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
