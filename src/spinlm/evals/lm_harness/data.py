"""Files of the user's own in the place of a task's dataset."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spinlm.data.sources import open_source
from spinlm.errors import DataError, RowError, RunError
from spinlm.recipe.schema import Data
from spinlm.utils.atomic import file_digest, write_json

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class LocalData:
    """Files that take the place of a task's dataset."""

    questions: Path
    fewshot: Path | None = None  # where the few-shot examples come from; None: the other questions

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        paths = {"questions": self.questions, "fewshot": self.fewshot}
        return {part: file_digest(path) for part, path in paths.items() if path is not None}


def local_data(given: Sequence[str]) -> dict[str, LocalData]:
    """Files by task, from `NAME=FILE.jsonl` and `NAME:fewshot=FILE.jsonl`. Every row is looked at.

    Raises:
        RunError: one is not written in that way.
        DataError: a file is missing, empty or damaged, or a few-shot example is also among the questions.
    """
    found: dict[str, dict[str, Path]] = {}
    for text in given:
        match = re.fullmatch(r"(?P<name>[^=]*?[^=:])(?P<part>:fewshot)?=(?P<path>.+)", text)
        if match is None or re.search(r"\s", match["name"]):
            raise RunError(
                f"--task-data: {text!r} cannot be read. Write NAME=FILE.jsonl for a task's questions, and "
                "NAME:fewshot=FILE.jsonl for its few-shot examples"
            )
        parts = found.setdefault(match["name"], {})
        part = "fewshot" if match["part"] else "questions"
        if part in parts:
            raise RunError(f"--task-data: {match['name']} has two files for its {part}")
        parts[part] = Path(match["path"]).expanduser().absolute()
    for name, parts in found.items():
        if "questions" not in parts:
            raise RunError(f"--task-data: {name} has few-shot examples and no questions. Add {name}=FILE.jsonl")
        rows = {part: _rows(path) for part, path in parts.items()}
        if both := rows["questions"] & rows.get("fewshot", set()):
            raise DataError(
                f"{parts['fewshot']}: {len(both)} of its rows are also questions of {name}, and a question that is "
                "shown with its answer measures nothing. Remove them; or leave this file out, then each question gets "
                "others of its own file as examples"
            )
    return {name: LocalData(**parts) for name, parts in found.items()}


def replace_data(manager: "TaskManager", data: dict[str, LocalData], scratch: Path) -> None:
    """Let tasks read local files: each gets a task file that includes its own and names another dataset.

    With one file both the questions and the few-shot examples are its rows. The harness keeps a question out of its own
    examples only where its config names the same split for both, so it does; fixed examples in the config stay.
    """
    from lm_eval.tasks import TaskManager

    for name, files in data.items():
        entry = manager.task_index.get(name)
        if entry is None or entry.cfg is None:
            continue  # it is not among what is measured, which is said when that is known
        if entry.kind.name != "TASK":
            what = "written in Python" if entry.kind.name == "PY_TASK" else "several tasks; give data for each of them"
            raise RunError(f"--task-data: {name} cannot have its data replaced: it is {what}")
        shots = entry.cfg.get("fewshot_config") or {}
        if files.fewshot is None and "process_docs" in shots:
            raise RunError(
                f"--task-data: {name} prepares its few-shot examples in another way than its questions, so one file "
                f"cannot serve as both. Add {name}:fewshot=FILE.jsonl"
            )
        pool = shots.get("split") or "fewshot"
        if files.fewshot is not None:
            splits, asked, shown = {"questions": files.questions, pool: files.fewshot}, "questions", pool
        elif "samples" in shots:
            splits, asked, shown = {"questions": files.questions}, "questions", None
        else:
            splits, asked, shown = {pool: files.questions}, pool, pool
        options = {
            "data_files": {split: str(path) for split, path in splits.items()},
            "cache_dir": str(scratch / "cache"),
        }
        changes = {
            "include": str(entry.yaml_path),
            "task": name,
            "tag": None,  # the tags that there are have the task already
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": options,
            "training_split": None,
            "validation_split": None,
            "test_split": asked,
            "fewshot_split": shown,
        }
        write_json(scratch / "tasks" / f"{len(list((scratch / 'tasks').glob('*')))}.yaml", changes)
    if data:
        manager.task_index.update(TaskManager(include_defaults=False, include_path=[scratch / "tasks"]).task_index)


def _rows(path: Path) -> set[str]:
    """The rows of a file, in one way of writing each."""
    if path.suffix.lower() != ".jsonl":
        raise DataError(f"{path}: --task-data takes .jsonl files, with one JSON object on each line")
    source = open_source(Data(path=str(path)))
    rows = set()
    for index, number in enumerate(source.numbers):
        try:
            rows.add(json.dumps(source.row(index), sort_keys=True))
        except RowError as error:
            raise DataError(f"{path}, row {number}: {error}. Correct or remove it") from error
    return rows
