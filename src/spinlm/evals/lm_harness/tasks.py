"""Load tasks of lm-evaluation-harness and set their number of few-shot examples."""

import contextlib
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import MissingPackageError, RunError, first_line
from spinlm.utils.suggest import nearest

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class TaskSpec:
    """A task, a group or a tag of lm-evaluation-harness that the user selects."""

    name: str
    num_fewshot: int | None = None  # None: the number in the task's YAML file
    metric: str | None = None  # the main metric, as METRIC,FILTER; None: the first one


@dataclass(frozen=True)
class Suite:
    """Tasks that are reported together."""

    tasks: tuple[TaskSpec, ...]
    chat_template: bool = False  # whether prompts are rendered with the chat template unless the user says otherwise


SUITES = {
    "open-llm-leaderboard": Suite(
        (
            TaskSpec("arc_challenge", 25, "acc_norm,none"),
            TaskSpec("truthfulqa_mc2", 0, "acc,none"),
            TaskSpec("winogrande", 5, "acc,none"),
            TaskSpec("gsm8k", 5, "exact_match,strict-match"),
            TaskSpec("hellaswag", 10, "acc_norm,none"),
            TaskSpec("mmlu", 5, "acc,none"),
        )
    ),
    # The variant with worked examples: the YAML files hold three of them.
    "big-bench": Suite(
        (
            TaskSpec("bbh_cot_fewshot_causal_judgement", 3, "exact_match,get-answer"),
            TaskSpec("bbh_cot_fewshot_formal_fallacies", 3, "exact_match,get-answer"),
            TaskSpec("bbh_cot_fewshot_sports_understanding", 3, "exact_match,get-answer"),
        )
    ),
    # The members of the harness's group `leaderboard`.
    "leaderboard-v2": Suite(
        (
            TaskSpec("leaderboard_ifeval", metric="prompt_level_strict_acc,none"),
            TaskSpec("leaderboard_bbh", metric="acc_norm,none"),
            TaskSpec("leaderboard_math_hard", metric="exact_match,none"),
            TaskSpec("leaderboard_gpqa", metric="acc_norm,none"),
            TaskSpec("leaderboard_musr", metric="acc_norm,none"),
            TaskSpec("leaderboard_mmlu_pro", metric="acc,none"),
        ),
        chat_template=True,
    ),
    "ifeval": Suite((TaskSpec("ifeval", metric="prompt_level_strict_acc,none"),), chat_template=True),
}
"""The first two are the benchmarks of the SPIN paper, with its few-shot numbers and metrics. The others have the
few-shot numbers of the harness's YAML files."""

INSTALL = "pip install 'lm-eval[ifeval,math]>=0.4.13'"


@dataclass(frozen=True)
class TaskGroup:
    """The tasks of one row of the score table: one task, or a group that has an aggregate score."""

    name: str
    tasks: "dict[str, Task]"
    metric: str | None  # see `TaskSpec`
    lm_eval_group: "Group | None" = None  # computes the aggregate score


def harness_version() -> str:
    """Return the installed version of lm-evaluation-harness.

    Raises:
        MissingPackageError: lm-evaluation-harness is not installed.
    """
    try:
        return version("lm_eval")
    except PackageNotFoundError as error:
        raise MissingPackageError(
            f"this benchmark needs lm-evaluation-harness, which is not installed. Run: {INSTALL}"
        ) from error


def select_tasks(suite: str | None, tasks: str | None, num_fewshot: int | None) -> list[TaskSpec]:
    """Return what `--suite`, `--tasks` and `--num-fewshot` select. With both, `--tasks` selects tasks of the suite.

    Raises:
        RunError: an option is missing, a suite or a task of a suite is unknown, or a suite gets a few-shot number.
    """
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if "" in names or len(set(names)) < len(names):
        raise RunError(f"--tasks {tasks}: a name is empty or repeated. Write different names, separated by commas")
    if suite is None:
        if not names:
            raise RunError("nothing to measure. Choose a suite with --suite, or tasks with --tasks")
        metrics = {spec.name: spec.metric for known in SUITES.values() for spec in known.tasks}
        return [TaskSpec(name, num_fewshot, metrics.get(name)) for name in names]
    if suite not in SUITES:
        raise RunError(f"--suite: there is no suite {suite!r}.{_hint(suite, SUITES)} Known: {', '.join(SUITES)}")
    if num_fewshot is not None:
        raise RunError(f"--num-fewshot: {suite} sets the few-shot numbers. Leave out --num-fewshot or --suite")
    members = {spec.name: spec for spec in SUITES[suite].tasks}
    if unknown := [name for name in names if name not in members]:
        raise RunError(f"--tasks: {suite} has no task {unknown[0]!r}. Its tasks: {', '.join(members)}")
    return [members[name] for name in names or members]


def load_tasks(specs: Sequence[TaskSpec], include_path: Path | None) -> list[TaskGroup]:
    """Load tasks with their datasets, and set their few-shot numbers.

    Args:
        specs: what to load.
        include_path: folder with task YAML files. A file replaces the task of the harness that has the same name.

    Raises:
        RunError: a task is unknown or cannot be loaded, or cannot have this number of few-shot examples.
    """
    manager = _task_manager([spec.name for spec in specs], include_path)
    for spec in specs:
        if spec.name not in manager.task_index:
            folder = f" Files in {include_path} that are not valid are skipped" if include_path else ""
            hint = _hint(spec.name, manager.all_tasks)
            raise RunError(f"{spec.name}: lm-evaluation-harness has no such task.{hint}{folder}")
    return [group for spec in specs for group in _load(manager, spec)]


def _task_manager(names: Sequence[str], include_path: Path | None) -> "TaskManager":
    """Return a task manager that knows these tasks, if they exist."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise RunError(f"--include-path {include_path}: no such folder")
        # Reading the harness's own 14,000 files takes many seconds. Tasks and groups of the user do not need them.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(_is_complete(own, name) for name in names):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _is_complete(manager: "TaskManager", name: Any) -> bool:
    """Return whether a manager knows a task, or a group and all its members."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    members = [] if entry is None or entry.kind.name == "TASK" else (entry.cfg or {}).get("task", [None])
    return entry is not None and all(_is_complete(manager, member) for member in members)


def _load(manager: "TaskManager", spec: TaskSpec) -> list[TaskGroup]:
    """Load the tasks of a spec: as one group if it has an aggregate score, otherwise as one group per task."""
    from lm_eval.defaults import DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)  # GPQA shuffles its choices when it is loaded
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NLTK reports its downloads there
            loaded = manager.load([spec.name])
    except Exception as error:  # a task may run any code when it loads
        raise _loading_error(spec.name, error) from error
    for task in loaded["tasks"].values():
        if "ifeval" in getattr(task.config.process_results, "__module__", ""):
            _check_nltk_data(spec.name)
        _set_num_fewshot(task, spec.num_fewshot)
    group = loaded.get("groups", {}).get(spec.name)
    if group is not None and group.has_aggregation:
        return [TaskGroup(spec.name, loaded["tasks"], spec.metric, group)]
    return [
        TaskGroup(name, {name: task}, spec.metric if name == spec.name else None)
        for name, task in loaded["tasks"].items()
    ]


def _loading_error(name: str, error: Exception) -> RunError | MissingPackageError:
    """Return the error to raise for a task that cannot be loaded, with its remedy."""
    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception):
        causes.append(cause)
    reason = first_line(causes[min(1, len(causes) - 1)])
    if missing := [cause for cause in causes if isinstance(cause, ImportError)]:
        return MissingPackageError(
            f"{name}: a package is not installed ({first_line(missing[-1])}). IFEval and MATH need: {INSTALL}"
        )
    if "gated" in str(error):
        return RunError(
            f"{name}: {reason} Accept the terms on its page, then log in with `hf auth login` or set "
            "HF_TOKEN. Without access, select the other tasks with --tasks"
        )
    if isinstance(error, OSError):
        return RunError(
            f"{name}: cannot load the dataset ({reason}). Without a network, copy the Hugging Face cache of a "
            "machine that has loaded it, or write a task YAML for local files and use --include-path"
        )
    return RunError(f"{name}: lm-evaluation-harness cannot load the task: {reason}")


def _check_nltk_data(name: str) -> None:
    """Check that the data with which NLTK splits sentences is here. The harness has tried to download it.

    Raises:
        RunError: the data is missing. Otherwise IFEval would fail after the responses are generated.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError as error:
        raise RunError(
            f"{name}: IFEval needs NLTK's data punkt_tab, which cannot be downloaded. Run `python -m nltk.downloader "
            "punkt_tab` on a machine with a network, and copy its folder nltk_data to the home folder of this one, or "
            "to the folder that NLTK_DATA names"
        ) from error


def _set_num_fewshot(task: "Task", num_fewshot: int | None) -> None:
    """Set the number of few-shot examples of a task.

    Raises:
        RunError: the task has none, or the harness could show a question among its own examples.
    """
    name, default = task.task_name, task.get_config("num_fewshot")
    if default == 0 and num_fewshot:
        raise RunError(f"{name}: this task takes no few-shot examples. Leave out --num-fewshot")
    number = (default or 0) if num_fewshot is None else num_fewshot
    task.set_config("num_fewshot", number)
    config = getattr(task, "fewshot_cfg", None)
    if number == 0 or config is None or (config.samples and config.split is None):
        return
    train, validation, test = (task.get_config(f"{split}_split") for split in ("training", "validation", "test"))
    questions, examples = test or validation, config.split or train or validation or test
    # The harness removes the question from the examples only if the examples are from the test split.
    if examples == questions and config.split != test:
        raise RunError(
            f"{name}: the few-shot examples of a question may contain the question. Set fewshot_split: {questions} and "
            f"test_split: {questions} in the task's YAML file, or measure with --num-fewshot 0"
        )


def _hint(name: str, known: Iterable[str]) -> str:
    similar = nearest(name, known)
    return f" Did you mean {similar}?" if similar else ""
