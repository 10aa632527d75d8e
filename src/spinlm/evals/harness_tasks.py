"""Which tasks of lm-evaluation-harness are measured, with how many few-shots, on what data."""

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spinlm.config import Data
from spinlm.data.chat import RowError
from spinlm.data.sources import open_source
from spinlm.errors import DataError, MissingPackageError, RunError
from spinlm.files import file_digest, write_json

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Wanted:
    """A task, a group or a tag of the harness that somebody asks for."""

    name: str
    shots: int | None = None  # None: as many as its file says
    metric: str | None = None  # the one that counts, as the harness writes it: METRIC,FILTER


SUITES = {
    "open-llm-leaderboard": (
        Wanted("arc_challenge", 25, "acc_norm,none"),
        Wanted("truthfulqa_mc2", 0, "acc,none"),
        Wanted("winogrande", 5, "acc,none"),
        Wanted("gsm8k", 5, "exact_match,strict-match"),
        Wanted("hellaswag", 10, "acc_norm,none"),
        Wanted("mmlu", 5, "acc,none"),
    ),
    # The variant with worked answers: each prompt begins with the three that the task's file holds.
    "big-bench": (
        Wanted("bbh_cot_fewshot_causal_judgement", 3, "exact_match,get-answer"),
        Wanted("bbh_cot_fewshot_formal_fallacies", 3, "exact_match,get-answer"),
        Wanted("bbh_cot_fewshot_sports_understanding", 3, "exact_match,get-answer"),
    ),
}
"""The paper's benchmarks, with its few-shots and metrics."""


@dataclass(frozen=True)
class LocalData:
    """Files that take the place of a task's dataset."""

    questions: Path
    fewshot: Path | None = None  # where the few-shot examples come from; None: the other questions

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        paths = {"questions": self.questions, "fewshot": self.fewshot}
        return {part: file_digest(path) for part, path in paths.items() if path is not None}


@dataclass(frozen=True)
class Unit:
    """What gets one line in the table: a task, or a group of tasks with a score of its own."""

    name: str
    tasks: "dict[str, Task]"
    metric: str | None
    group: "Group | None" = None
    data: dict[str, LocalData] = field(default_factory=dict)  # by task


def harness_version() -> str:
    """The version of lm-evaluation-harness that is installed.

    Raises:
        MissingPackageError: none is.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise MissingPackageError(
            "this benchmark needs lm-evaluation-harness, which is not installed. Run: pip install 'lm-eval>=0.4.13'"
        ) from error


# What is asked for


def wanted_tasks(suite: str | None, tasks: str | None) -> list[Wanted]:
    """What `--suite` and `--tasks` ask for: a suite, some tasks of it, or tasks as `NAME` or `NAME:SHOTS`.

    Raises:
        RunError: there is no such suite, it has no such task, or a task is not written in that way.
    """
    if suite is not None and suite not in SUITES:
        known = [*SUITES, "mt-bench"]
        raise RunError(f"--suite: there is no suite {suite!r}.{_nearest(suite, known)} Known: {', '.join(known)}")
    own = {one.name: one for of in SUITES.values() for one in of}
    if tasks is None:
        assert suite is not None, "the command line asks for one of them"
        return list(SUITES[suite])
    asked: dict[str, Wanted] = {}
    for text in tasks.split(","):
        # A name may hold colons itself: members of some groups are GROUP::TASK.
        match = re.fullmatch(r"(?P<name>[^\s=]*?[^\s=:])(?::(?P<shots>\d+))?", text.strip())
        if match is None:
            raise RunError(f"--tasks: {text!r} is no task. Write NAME or NAME:FEWSHOTS, with commas between tasks")
        name, shots = match["name"], match["shots"]
        if name in asked:
            raise RunError(f"--tasks: {name} is named twice")
        if suite is None:
            asked[name] = Wanted(name, None if shots is None else int(shots), own[name].metric if name in own else None)
            continue
        members = {one.name: one for one in SUITES[suite]}
        if name not in members:
            raise RunError(f"--tasks: {suite} has no task {name!r}; it has {', '.join(members)}")
        if shots is not None:
            raise RunError(
                f"--tasks {text}: {suite} sets the few-shots itself. Leave :{shots} out, or leave --suite out"
            )
        asked[name] = members[name]
    return list(asked.values())


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


# Where the harness has it


def open_units(wanted: Sequence[Wanted], data: dict[str, LocalData], folder: Path | None, scratch: Path) -> list[Unit]:
    """Load the tasks, with their data, and set their few-shots.

    Args:
        wanted: what to load.
        data: files that replace datasets, by task.
        folder: with task files of the user's own; one that has the name of a task of the harness replaces it.
        scratch: an empty folder that lives as long as the tasks.

    Raises:
        RunError: a task is unknown, cannot be loaded, or cannot have so many few-shots; a task file is broken.
        DataError: a file of the user's does not fit its task.
    """
    own = _own_names(folder) if folder is not None else {}
    names = [one.name for one in wanted]
    shipped = {} if all(name in own for name in names) else _shipped_names()

    def unknown(name: str) -> RunError:
        hint = " Tasks of your own are found with --task-folder" if folder is None else ""
        return RunError(f"{name}: lm-evaluation-harness has no such task.{_nearest(name, [*own, *shipped])}{hint}")

    for name in names:
        if name not in own and name not in shipped:
            raise unknown(name)
    manager = _manager(names, own, shipped, folder)
    for name in names:
        if name not in manager.task_index:
            raise unknown(name)
    _replace_data(manager, data, scratch)
    units = [unit for one in wanted for unit in _load(manager, one, data)]
    measured = {name for unit in units for name in unit.tasks}
    for name in data:
        if name not in measured:
            listed = f"{len(measured)} tasks" if len(measured) > 8 else ", ".join(sorted(measured))
            raise RunError(f"--task-data: {name} is not among what is measured ({listed}).{_nearest(name, measured)}")
    return units


@functools.cache
def _shipped_names() -> dict[str, Path]:
    """Every task, group and tag of the harness, with its file (a few words too many, of comments).

    The harness's own index of its 14,000 files takes ten times as long.
    """
    import lm_eval

    entry = re.compile(
        rb"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*((?:\r?\n[ \t]*-[ \t]*[^\r\n]+)+|[^\r\n]*)""", re.MULTILINE
    )
    names: dict[str, Path] = {}
    for parent, _, files in os.walk(Path(lm_eval.__file__).parent / "tasks"):
        for file in files:
            if file.endswith((".py", ".pyc", ".md")):
                continue
            path = Path(parent) / file
            for value in entry.findall(path.read_bytes()):
                for name in re.findall(rb"[\w.:/+()-]*[\w)]", value):
                    if b"\n" in value:  # a list only refers to it
                        names.setdefault(name.decode(), path)
                    else:
                        names[name.decode()] = path
    return names


class _TaskFile(yaml.SafeLoader):
    """Reads a task file without the functions it names."""


_TaskFile.add_multi_constructor("!", lambda loader, suffix, node: None)


def _own_names(folder: Path) -> dict[str, Path]:
    """The tasks, groups and tags of the user's own, each with its file."""
    if not folder.is_dir():
        raise RunError(f"--task-folder {folder}: no such folder")
    paths = sorted(folder.rglob("*.yaml"))
    if not paths:
        raise RunError(f"--task-folder {folder}: has no task files (*.yaml)")
    names: dict[str, Path] = {}
    for path in paths:
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskFile)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: not a task file: it must hold names with values, such as task: my_task")
        for key in ("task", "group", "tag"):
            values = content.get(key)
            values = values if isinstance(values, list) else [values]
            names |= {
                value: path for value in values if isinstance(value, str) and not (key == "task" and "group" in content)
            }
    return names


def _manager(
    names: Sequence[str], own: dict[str, Path], shipped: dict[str, Path], folder: Path | None
) -> "TaskManager":
    """The harness's task manager, over no more of its 14,000 files than these tasks need."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    theirs = {root / shipped[name].relative_to(root).parts[0] for name in names if name not in own}
    mine = [] if folder is None else [folder.absolute()]
    small = TaskManager(include_defaults=False, include_path=[*sorted(theirs), *mine])
    for name in names:
        if name in own and name not in small.task_index:  # it passes over a file that it cannot read
            raise RunError(f"{own[name]}: lm-evaluation-harness cannot read this file. Is what it includes there?")
    return small if _complete(small.task_index, names) else TaskManager(include_path=list(mine))


def _complete(index: dict[str, Any], names: Sequence[Any]) -> bool:
    """Whether an index surely has all that these names stand for."""
    for name in names:
        entry = index.get(name) if isinstance(name, str) else None
        if entry is None or entry.kind.name == "TAG":  # a tag's tasks may lie anywhere
            return False
        if entry.kind.name == "GROUP" and not _complete(index, entry.cfg["task"]):
            return False
    return True


def _replace_data(manager: "TaskManager", data: dict[str, LocalData], scratch: Path) -> None:
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


def _load(manager: "TaskManager", wanted: Wanted, data: dict[str, LocalData]) -> list[Unit]:
    """The units that a name stands for, ready to be measured."""
    from lm_eval.api.group import Group

    try:
        loaded = manager.load([wanted.name])
    except Exception as error:  # a task is a program, and its dataset is fetched: anything may come out of it
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        if isinstance(error, OSError):
            several = manager.task_index[wanted.name].kind.name != "TASK"
            name = "TASK" if several else wanted.name
            raise RunError(
                f"{wanted.name}: {'a dataset of its tasks' if several else 'its dataset'} cannot be fetched ({error}). "
                f"With a network it is fetched once; without, give its examples: --task-data {name}=FILE.jsonl"
                + (", for each of its tasks" if several else "")
            ) from error
        if wanted.name in data:
            raise DataError(
                f"{data[wanted.name].questions}: does not fit {wanted.name}: {reason}. Its rows need the columns of "
                "the task's own dataset"
            ) from error
        raise RunError(f"{wanted.name}: lm-evaluation-harness cannot load it: {reason}") from error

    def units(item: Any) -> Iterator[Unit]:
        if not isinstance(item, Group):
            yield _unit(item.task_name, {item.task_name: item})
        elif item.has_aggregation:
            yield _unit(item.name, {task.task_name: task for task in item.get_all_tasks()}, item)
        else:
            for child in item:
                yield from units(child)

    def _unit(name: str, tasks: "dict[str, Task]", group: "Group | None" = None) -> Unit:
        for task in tasks.values():
            _set_shots(task, wanted.shots)
        mine = {task: data[task] for task in tasks if task in data}
        return Unit(name, tasks, wanted.metric if name == wanted.name else None, group, mine)

    group = loaded.get("groups", {}).get(wanted.name)
    return (
        list(units(group)) if group is not None else [unit for task in loaded["tasks"].values() for unit in units(task)]
    )


def _set_shots(task: "Task", shots: int | None) -> None:
    """Give a task its few-shots.

    Raises:
        RunError: it cannot have so many.
    """
    name, own = task.task_name, task.get_config("num_fewshot")
    if own == 0 and shots:
        raise RunError(f"{name}: has no few-shots, its prompt is complete as it is. Leave :{shots} out")
    number = own or 0 if shots is None else shots
    task.set_config("num_fewshot", number)
    config, sampler = getattr(task, "fewshot_cfg", None), getattr(task, "sampler", None)
    if config is None or sampler is None or number == 0:
        return
    asked = task.get_config("test_split") or task.get_config("validation_split")
    pool = config.split or next(
        (split for part in ("training", "validation", "test") if (split := task.get_config(f"{part}_split"))), None
    )
    shared = pool == asked and not (config.split is None and config.samples)
    if len(sampler.df) < number + shared:
        raise RunError(
            f"{name}: {number} few-shots cannot be drawn from {len(sampler.df)} examples"
            + (", of which one is the question itself" if shared else "")
        )
    if shared and config.split != task.get_config("test_split"):
        raise RunError(
            f"{name}: its few-shot examples are drawn from its questions, and lm-evaluation-harness would not keep a "
            f"question out of its own examples. Set fewshot_split: {asked} and test_split: {asked} in its file, or "
            f"measure it without few-shots ({name}:0)"
        )


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""
