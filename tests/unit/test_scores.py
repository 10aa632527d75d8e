"""Benchmark scores: files, averages, and which scores are comparable."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from spinlm.evals.scores import AVERAGED_TASKS, Score, add_scores, average, read_scores, rich_table
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import START

SUITE = "open-llm-leaderboard"


def score(value: float, error: float | None = 0.01, **settings: Any) -> Score:
    return Score(value, error, "acc", 100, settings)


def shown(run: RunDir, *iterations: int) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rich_table(run, iterations, SUITE))
    return capture.get()


def test_scores_are_added_and_replaced(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_scores(run, 0) == {}
    add_scores(run, 0, SUITE, {"gsm8k": score(0.1), "mmlu": score(0.3)})
    add_scores(run, 0, "tasks", {"gsm8k": score(0.7)})
    add_scores(run, 0, SUITE, {"gsm8k": score(0.2, limit=5)})
    assert read_scores(run, 0) == {
        SUITE: {"gsm8k": score(0.2, limit=5), "mmlu": score(0.3)},
        "tasks": {"gsm8k": score(0.7)},
    }
    assert read_scores(run, START) == {}


def test_average_of_the_six_tasks_has_the_error_of_independent_tasks() -> None:
    six = AVERAGED_TASKS[SUITE]
    scores = {task: score(number / 10, 0.03) for number, task in enumerate(six)}
    mean = average(scores, six)
    assert mean is not None
    assert math.isclose(mean.value, 0.25)  # of 0, 0.1, …, 0.5
    assert mean.standard_error is not None and math.isclose(mean.standard_error, 0.03 * math.sqrt(6) / 6)
    assert mean.examples == 600
    assert average({task: scores[task] for task in six[1:]}, six) is None
    without = average(scores | {"mmlu": score(0.5, None)}, six)
    assert without is not None and without.standard_error is None


def test_table_shows_the_average_if_all_six_tasks_were_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    six = AVERAGED_TASKS[SUITE]
    add_scores(run, START, SUITE, {task: score(0.5) for task in six})
    add_scores(run, 0, SUITE, {task: score(0.25) for task in six[:5]})
    lines = [line.split() for line in shown(run, START, 0).splitlines()]
    assert ["mmlu", "acc", "100", "0.500", "±", "0.010", "–"] in lines
    assert ["average", "mean", "600", "0.500", "±", "0.004", "–"] in lines


def test_scores_with_different_settings_are_marked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    add_scores(run, START, SUITE, {"gsm8k": score(0.5, num_fewshot=5), "mmlu": score(0.5, num_fewshot=5)})
    add_scores(run, 0, SUITE, {"gsm8k": score(0.6, num_fewshot=5), "mmlu": score(0.6, num_fewshot=5)})
    assert "*" not in shown(run, START, 0)
    add_scores(run, 0, SUITE, {"mmlu": score(0.7, num_fewshot=0)})
    lines = shown(run, START, 0).splitlines()
    assert [line.split()[0] for line in lines if line.rstrip().endswith("*")] == ["mmlu"]
    assert any(line.strip().startswith("* has other settings") for line in lines)
