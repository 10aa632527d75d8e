"""Measure players with lm-evaluation-harness: its tasks, prompts, few-shot examples and metrics."""

import hashlib
import inspect
import json
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.errors import RunError, SpinError, first_line, is_out_of_memory
from spinlm.evals.lm_harness.tasks import SUITES, TaskGroup, harness_version, load_tasks, select_tasks
from spinlm.evals.scores import Score, add_scores, read_scores
from spinlm.model.run import Run
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import player_name

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from spinlm.evals.lm_harness.model import PlayerLM

log = logging.getLogger("spinlm")


@dataclass(frozen=True)
class HarnessOptions:
    """What to measure, and how. The names are those of lm-evaluation-harness."""

    suite: str | None = None  # a name in `SUITES`
    tasks: str | None = None  # names, separated by commas
    num_fewshot: int | None = None  # None: the number in each task's YAML file
    limit: int | None = None  # maximum examples per task; the first ones are taken
    include_path: Path | None = None  # folder with task YAML files
    # None: as the suite has it, otherwise False. With it, few-shot examples become turns of the conversation.
    apply_chat_template: bool | None = None
    batch_size: int = 8  # requests per forward pass


def run_lm_harness(run: Run, iterations: Sequence[int], options: HarnessOptions) -> None:
    """Measure players and write their scores: under the name of the suite, or under `tasks`.

    The scores of a task or a group are written when it is finished. A score that was measured with the same settings
    is kept. A score with other settings is replaced.

    Raises:
        MissingPackageError: lm-evaluation-harness is not installed.
        RunError: a suite or a task is unknown or cannot be measured; see `load_tasks`.
        StoppedError: the user asked to stop.
    """
    specs = select_tasks(options.suite, options.tasks, options.num_fewshot)
    release = harness_version()
    groups = load_tasks(specs, options.include_path)

    from spinlm.evals.lm_harness.model import PlayerLM

    players = run.players
    players.load(iterations[0])
    model = PlayerLM(players, options.batch_size)
    chat_template = options.apply_chat_template
    if chat_template is None:
        chat_template = options.suite is not None and SUITES[options.suite].chat_template
    common = {
        "lm_eval": release,
        "limit": options.limit,
        "chat_template": chat_template,
        "precision": str(players.dtype).removeprefix("torch."),
    }
    settings = {group.name: common | _settings(group, options.limit) for group in groups}
    for iteration in iterations:
        players.load(iteration)
        for group in groups:
            _measure(model, run.folder, iteration, options.suite or "tasks", group, settings[group.name])


def _measure(
    model: "PlayerLM", folder: RunDir, iteration: int, suite: str, group: TaskGroup, settings: dict[str, Any]
) -> None:
    """Measure a group of tasks unless it has a score with these settings. Write its tasks' scores as SUITE/GROUP."""
    title = player_name(iteration)
    counts = {"player": folder.player_digest(iteration)}
    score = read_scores(folder, iteration).get(suite, {}).get(group.name)
    if score is not None and (score.settings, score.counts) == (settings, counts):
        log.info("%s: %s was already measured with the same settings", title, group.name)
        return
    model.label, model.truncated = f"{title}: {group.name}", False
    results = _evaluate(model, group, settings["limit"], settings["chat_template"])
    if model.truncated:
        log.warning(
            "%s: some prompts of %s exceed the %d tokens of the model and lost their beginning",
            *(title, group.name, model.max_length),
        )
    if group.lm_eval_group is not None:
        members = [_scores(name, results[name], None, settings, counts) for name in group.tasks]
        merged = {name: score for scores in members for name, score in scores.items()}
        add_scores(folder, iteration, f"{suite}/{group.name}", merged)
        results[group.name] = dict(group.lm_eval_group.aggregate(results))
    add_scores(folder, iteration, suite, _scores(group.name, results[group.name], group.metric, settings, counts))


def _evaluate(model: "PlayerLM", group: TaskGroup, limit: int | None, chat_template: bool) -> dict[str, Any]:
    """Return the results of the harness by task: values and standard errors by METRIC,FILTER.

    Raises:
        RunError: a task fails, or the memory is too small.
    """
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    # The harness's own seeds, set for each player: all players see the same few-shot examples.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in group.tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    # The harness's process pool for bootstraps inherits our SIGTERM handler and would never end.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        output = evaluate(
            model,
            {"tasks": group.tasks},
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except SpinError:
        raise
    except Exception as error:  # a task may run any code
        if is_out_of_memory(error):
            raise RunError(f"{group.name}: out of memory. Lower --batch-size; finished scores are kept") from error
        if isinstance(error, RuntimeError):
            raise  # the model failed
        raise RunError(f"{group.name}: lm-evaluation-harness cannot measure it: {first_line(error)}") from error
    assert output is not None, "there is one process"
    return dict(output["results"])


def _settings(group: TaskGroup, limit: int | None) -> dict[str, Any]:
    """Return what the prompts and the metrics of a group depend on. The location of the data is left out."""
    configs, rows = {}, {}
    for name, task in group.tasks.items():
        config = task.dump_config()
        configs[name] = {key: value for key, value in config.items() if key not in ("dataset_kwargs", "metadata")}
        rows[name] = _rows(task, limit)
    first = next(iter(group.tasks.values()))
    numbers = sorted({task.get_config("num_fewshot") for task in group.tasks.values()})
    return {
        "num_fewshot": numbers[0] if len(numbers) == 1 else numbers,
        "task_version": first.VERSION if group.lm_eval_group is None else group.lm_eval_group.version,
        "definition": _digest(configs),
        "data": _digest(rows),
    }


def _rows(task: "Task", limit: int | None) -> list[Any]:
    """Return the questions of a task and the rows that few-shot examples are drawn from."""
    examples = getattr(getattr(task, "sampler", None), "df", []) if task.get_config("num_fewshot") else []
    return [*islice(task.eval_docs, limit), *examples]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_source)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _source(value: Any) -> str:
    """Return the source code of a function, or the name of the type of another object."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return str(getattr(value, "__qualname__", type(value).__name__))


def _scores(
    name: str, results: dict[str, Any], metric: str | None, settings: dict[str, Any], counts: dict[str, Any]
) -> dict[str, Score]:
    """Return the metrics of a task as scores: the main metric under the task's name, the others under TASK METRIC."""
    keys = [key for key in results if "," in key and "_stderr," not in key]
    main = metric if metric in keys else keys[0]
    scores = {}
    for key in sorted(keys, key=lambda key: key != main):
        metric_name, _, filter_name = key.partition(",")
        error = results.get(f"{metric_name}_stderr,{filter_name}")
        label = key.removesuffix(",none")
        scores[name if key == main else f"{name} {label}"] = Score(
            value=float(results[key]),
            standard_error=None if error in (None, "N/A") else float(error),
            metric=label,
            examples=int(results.get("sample_count", {}).get(key, results["sample_len"])),  # some tasks lack a metric
            settings=settings,
            counts=counts,
        )
    return scores
