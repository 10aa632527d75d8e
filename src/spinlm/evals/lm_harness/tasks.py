"""Which tasks of lm-evaluation-harness are measured, with how many few-shots, on what data."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import DataError, MissingPackageError, RunError
from spinlm.evals.lm_harness.data import LocalData, replace_data
from spinlm.evals.lm_harness.index import own_names, shipped_names, task_manager
from spinlm.utils.suggest import nearest

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
    own = own_names(folder) if folder is not None else {}
    names = [one.name for one in wanted]
    shipped = {} if all(name in own for name in names) else shipped_names()

    def unknown(name: str) -> RunError:
        hint = " Tasks of your own are found with --include-path" if folder is None else ""
        return RunError(f"{name}: lm-evaluation-harness has no such task.{_nearest(name, [*own, *shipped])}{hint}")

    for name in names:
        if name not in own and name not in shipped:
            raise unknown(name)
    manager = task_manager(names, own, shipped, folder)
    for name in names:
        if name not in manager.task_index:
            raise unknown(name)
    replace_data(manager, data, scratch)
    units = [unit for one in wanted for unit in _load(manager, one, data)]
    measured = {name for unit in units for name in unit.tasks}
    for name in data:
        if name not in measured:
            listed = f"{len(measured)} tasks" if len(measured) > 8 else ", ".join(sorted(measured))
            raise RunError(f"--task-data: {name} is not among what is measured ({listed}).{_nearest(name, measured)}")
    return units


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
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""
