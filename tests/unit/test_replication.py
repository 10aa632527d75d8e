"""The statistics of the replication, on numbers worked out by hand, and its plans."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from spinlm import load_recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import write_json

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "replication"
sys.path.insert(0, str(HERE))

from play import Arm, Plan  # noqa: E402  (modules beside the script, on the path above)
from results import Difference, Run, ended_runs  # noqa: E402

PLANS = sorted(HERE.glob("*.yaml"))


def write_run(folder: Path, scores: list[list[float]], *, iterations: int | None = None, go_on: bool = True) -> Run:
    """A run whose players have these task scores on prompts a, b, …"""
    names = ["start", *(f"iteration-{number}" for number in range(len(scores) - 1))]
    for name, values in zip(names, scores, strict=True):
        (folder / name).mkdir(parents=True)
        rows = [{"id": chr(97 + place), "task_score": value, "nll": 1.0} for place, value in enumerate(values)]
        (folder / name / "heldout_greedy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        markers = folder / ".spinlm" / name
        markers.mkdir(parents=True)
        (markers / "evaluate.done").touch()
        if name != "start":
            (markers / "train.done").write_text('{"steps": 3}')
            (markers / "promote.done").write_text(json.dumps({"go_on": go_on}))
    play = {"iterations": iterations or len(scores) - 1, "select": {"min_standard_errors": 2.0}}
    run = RunDir(folder)
    write_json(run.recipe, {"selfplay": play})  # JSON is YAML
    run.record_digest(run.recipe)
    return Run(run)


def test_interval_of_a_difference() -> None:
    """Mean 2, standard deviation 1, three seeds: 4.303 / √3 on either side."""
    difference = Difference([1.0, 2.0, 3.0])
    assert (difference.mean, difference.half_width) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert str(difference) == "+2.000 [-0.484, +4.484]"
    assert str(Difference([0.5])) == "+0.500"
    assert str(Difference([])) == "–"


def test_selected_player_is_measured_on_the_other_half(tmp_path: Path) -> None:
    """Ahead by 1 on a, c, e and behind by 1 on b, d, f: chosen on the first half, and measured on the second."""
    start, other = [0.5] * 6, [1.5, -0.5] * 3
    other[0] += 0.01  # so that there is a spread
    other[1] -= 0.01
    run = write_run(tmp_path / "run", [start, other])
    # Chosen on a, c, e: −0.51, −0.5, −0.5 on the others. Chosen on b, d, f: the start, 0.5 each.
    assert run.selected_score == pytest.approx((3 * 0.5 + (-0.51 - 0.5 - 0.5)) / 6)


def test_a_run_that_has_not_ended_is_left_out(tmp_path: Path) -> None:
    plan: Any = Plan("", (0, 1, 2, 3), {}, (), (), Path())
    scores = [[0.1, 0.2], [0.3, 0.2], [0.3, 0.4]]
    write_run(tmp_path / "d" / "seed-0" / "arm", scores)
    write_run(tmp_path / "d" / "seed-1" / "arm", scores, iterations=4)
    write_run(tmp_path / "d" / "seed-2" / "arm", scores, iterations=4, go_on=False)  # stopped by itself
    runs = ended_runs(plan, tmp_path, "d", "arm")
    assert runs.keys() == {0, 2}
    assert [runs[0].steps(player) for player in runs[0].players] == [0, 3, 6]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans(path: Path, tmp_path: Path) -> None:
    """Every run of a plan has a recipe that can be read, and every question two arms."""
    (tmp_path / "gsm8k.jsonl").touch()
    plan = Plan.read(path, {"gsm8k": tmp_path / "gsm8k.jsonl"} if "gsm8k" in path.read_text() else {})
    names = [arm.name for arm in plan.arms]
    for dataset in plan.datasets:
        for arm in plan.arms:
            _, _, _, command, recipe, *rest = plan.command(tmp_path, dataset, 1, arm)
            settings = rest[: rest.index("--run-dir")]
            assert command == "run" and load_recipe(Path(recipe), settings).seed == 1
            assert ("--start-from" in rest) == (arm is not plan.arms[0] and arm.start == "shared")
    for _, arm_name, baseline in plan.questions:
        assert arm_name in names and baseline in (*names, "start")


def test_mistakes_in_a_plan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="write shared or own"):
        Arm.of("a", {"settings": [], "start": "other"})
    with pytest.raises(SystemExit, match=r"--data gsm9k: small\.yaml has no such data set"):
        Plan.read(HERE / "small.yaml", {"gsm9k": tmp_path})
