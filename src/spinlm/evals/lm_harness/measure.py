"""Benchmarks by lm-evaluation-harness: its tasks, prompts, few-shots and metrics, on any player of a run."""

import hashlib
import inspect
import json
import logging
import os
import random
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from spinlm.errors import RunError, SpinError, is_out_of_memory
from spinlm.evals.lm_harness.data import local_data
from spinlm.evals.lm_harness.tasks import Unit, harness_version, open_units, wanted_tasks
from spinlm.evals.scores import Score, add_scores, read_scores
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import player_name

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from spinlm.evals.lm_harness.model import SeatedModel

log = logging.getLogger("spinlm")

BATCH_SIZE = 8


def harness(
    recipe: Recipe,
    run: RunDir,
    players: Sequence[int],
    suite: str | None,
    tasks: str | None,
    *,
    limit: int | None = None,
    data: Sequence[str] = (),
    folder: Path | None = None,
    chat_template: bool = False,
    batch_size: int = BATCH_SIZE,
) -> None:
    """Measure players on a suite, on some tasks of it, or on tasks by name, and keep their scores.

    A task's scores are on disk when it is finished. One that was measured with the same settings is not measured
    again; with others, its scores are replaced.

    Args:
        recipe: of the run.
        run: the run folder.
        players: iterations that made them; `START` is θ_0.
        suite: a name in `SUITES`; its scores are kept under that, others under `tasks`.
        tasks: `NAME` or `NAME:SHOTS`, with commas.
        limit: measure only so many examples of each task, the first ones.
        data: `NAME=FILE.jsonl` or `NAME:fewshot=FILE.jsonl`, see `local_data`.
        folder: with task files of the user's own.
        chat_template: put each prompt into the player's chat template, few-shots as turns.
        batch_size: requests that run at once.

    Raises:
        MissingPackageError: lm-evaluation-harness is not installed.
        RunError, DataError: what is asked for is not there or cannot be used; see `open_units`.
        StoppedError: the user asked to stop.
    """
    wanted = wanted_tasks(suite, tasks)
    files = local_data(data)
    release = harness_version()
    _give_up_on_a_hub_that_is_not_there()

    with tempfile.TemporaryDirectory(prefix="spinlm-") as scratch:
        units = open_units(wanted, files, folder, Path(scratch))

        from spinlm.evals.lm_harness.model import SeatedModel
        from spinlm.model.players import seat

        seated = seat(recipe, run)
        seated.become(players[0])
        model = SeatedModel(seated, batch_size)
        common = {
            "lm_eval": release,
            "limit": limit,
            "chat_template": chat_template,
            "precision": str(seated.dtype).removeprefix("torch."),
        }
        for iteration in players:
            seated.become(iteration)
            for unit in units:
                _measure(model, run, iteration, suite or "tasks", unit, common)


def _measure(model: "SeatedModel", run: RunDir, iteration: int, suite: str, unit: Unit, common: dict[str, Any]) -> None:
    """Measure a unit, unless that has been done. The tasks of a group are kept under SUITE/GROUP."""
    player = player_name(iteration)
    under = suite if unit.group is None else f"{suite}/{unit.name}"
    measured = {"player": run.player_digest(iteration)}
    metrics: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    again = 0
    for name, task in unit.tasks.items():
        local = unit.data.get(name)
        settings[name] = common | _settings(task, local is not None)
        settings[name]["data"] = local.digests() if local is not None else task.get_config("dataset_path")
        kept = read_scores(run, iteration).get(under, {})
        if name in kept and (kept[name].settings, kept[name].counts) == (settings[name], measured):
            metrics[name] = _metrics(name, kept)
            again += 1
            continue
        model.what, model.cut = f"{player}: {name}", False
        metrics[name] = _evaluate(model, name, task, common["limit"], common["chat_template"])
        if model.cut:
            log.warning(
                "%s: some prompts of %s are longer than the %d tokens this model takes, and lost their beginning",
                player,
                name,
                model.max_length,
            )
        add_scores(run, iteration, under, _scores(name, metrics[name], unit.metric, settings[name], measured))
    if again:
        which = unit.name if again == len(unit.tasks) else f"{again} of {len(unit.tasks)} tasks of {unit.name}"
        log.info("%s: %s measured before with the same settings, not measured again", player, which)
    if unit.group is not None:
        whole = unit.group.aggregate(metrics)
        one = next(iter(settings.values()))
        about = common | {
            "few_shots": one["few_shots"],
            "task_version": unit.group.version,
            "definition": _digest(settings),
            "data": {name: settings[name]["data"] for name in unit.data} or "of its tasks",
        }
        add_scores(run, iteration, suite, _scores(unit.name, dict(whole), unit.metric, about, measured))


def _settings(task: "Task", replaced: bool) -> dict[str, Any]:
    """What decides a task's prompts and metrics. Where data that was `replaced` lies is not part of it."""
    config = task.dump_config()
    left_out = ("dataset_kwargs", "metadata") if replaced else ("metadata",)
    own = {key: value for key, value in config.items() if key not in left_out}
    return {"few_shots": config["num_fewshot"], "task_version": task.VERSION, "definition": _digest(own)}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(thing: Any) -> str:
    """A function of a task by its source, anything else by its name."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return str(getattr(thing, "__qualname__", type(thing).__name__))


def _evaluate(model: "SeatedModel", name: str, task: "Task", limit: int | None, chat_template: bool) -> dict[str, Any]:
    """What the harness measures on a task: values and standard errors by METRIC,FILTER."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    # As the harness seeds itself, and for each player anew, so that all see the same few-shots.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    # Bootstraps go through a pool of processes otherwise, which take over how `graceful_shutdown` treats SIGTERM: then
    # the pool waits for ever for one that has to be told to end.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        found = evaluate(
            model,
            {"tasks": {name: task}},
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    except SpinError:
        raise
    except Exception as error:  # a task is a program: anything may come out of it
        if is_out_of_memory(error):
            raise RunError(f"{name}: out of memory. Lower --batch-size; what was measured is kept") from error
        if isinstance(error, RuntimeError):
            raise  # of the model
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RunError(f"{name}: lm-evaluation-harness cannot measure it: {reason}") from error
    assert found is not None, "only the first of several processes gets results, and there is one"
    return dict(found["results"][name])


def _scores(
    name: str, metrics: dict[str, Any], chosen: str | None, settings: dict[str, Any], counts: dict[str, Any]
) -> dict[str, Score]:
    """The metrics of a task as scores: the one that counts under the task's name, others beside it."""
    keys = [key for key in metrics if "," in key and "_stderr," not in key]
    if chosen is None or chosen not in keys:
        chosen = keys[0]
    scores = {}
    for key in (chosen, *(key for key in keys if key != chosen)):
        metric = key.removesuffix(",none")
        error = metrics.get(_keys(metric)[1])
        scores[name if key == chosen else f"{name} {metric}"] = Score(
            value=float(metrics[key]),
            standard_error=None if error in (None, "N/A") else float(error),
            metric=metric,
            examples=int(metrics["sample_len"]),
            settings=settings,
            counts=counts,
        )
    return scores


def _metrics(name: str, kept: dict[str, Score]) -> dict[str, Any]:
    """What `_scores` was made from."""
    metrics: dict[str, Any] = {"sample_len": kept[name].examples}
    for task, score in kept.items():
        if (task == name or task.startswith(f"{name} ")) and score.settings == kept[name].settings:
            key, error_key = _keys(score.metric)
            metrics |= {key: score.value, error_key: score.standard_error}
    return metrics


def _keys(metric: str) -> tuple[str, str]:
    """What the harness calls a metric, and its standard error."""
    name, _, made_by = metric.partition(",")
    made_by = made_by or "none"
    return f"{name},{made_by}", f"{name}_stderr,{made_by}"


def _give_up_on_a_hub_that_is_not_there() -> None:
    """Without a network, use what is here and cached at once, rather than after half a minute of asking again."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or "https" in getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        log.info("%s cannot be reached: only what is on this machine can be used", address.hostname)
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
