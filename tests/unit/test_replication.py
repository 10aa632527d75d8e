"""The statistics of the replication, on numbers worked out by hand; its scorers and its plans."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spinlm import load_recipe
from spinlm.rundir.layout import RunDir
from spinlm.utils.atomic import write_json

HERE = Path(__file__).resolve().parents[2] / "benchmarks" / "replication"
sys.path.insert(0, str(HERE))

import scorers  # noqa: E402  (modules beside the script, on the path above)
from measurements import Difference, Run, difference, ended_runs, is_ahead  # noqa: E402
from plan import Arm, Plan  # noqa: E402
from play import Player  # noqa: E402
from results import write_report  # noqa: E402

PLANS = sorted(HERE.glob("*.yaml"))


def write_run(folder: Path, scores: list[float], *, iterations: int | None = None, go_on: bool = True) -> None:
    """A run whose players have these mean task scores, and an NLL of 1 minus the score."""
    for number, score in enumerate(scores):
        name = "start" if number == 0 else f"iteration-{number - 1}"
        markers = folder / ".spinlm" / name
        markers.mkdir(parents=True)
        write_json(folder / name / "eval.json", {"task_score": score, "heldout_nll": 1 - score})
        (markers / "evaluate.done").touch()
        if number:
            (markers / "train.done").write_text('{"steps": 3}')
            (markers / "promote.done").write_text(json.dumps({"go_on": go_on}))
    play = {"iterations": iterations or len(scores) - 1, "replay": 0}
    run = RunDir(folder)
    write_json(run.recipe, {"selfplay": play, "objective": {"name": "spin", "beta": 0.5}})  # JSON is YAML
    run.record_digest(run.recipe)
    packages = dict.fromkeys(("torch", "transformers", "peft"), "1")
    values = {"started": "2026-01-01T", "packages": packages, "commit": "c", "python": "p", "device": "d"}
    write_json(run.provenance, values)
    regime = {"prompts": 8, "pairs": 8, "real_tokens": 50, "beta": 0.5, "cosine": 0.2, "cosine_corrected": 0.25}
    regime |= {"cosine_corrected_error": 0.1, "noise_ratio": 3.0, "synthetic_noise_share": 0.5, "nll_share": 0.0}
    write_json(run.regime(0), regime | {"forecast": {"beta_margin_by_epoch": [0.5, 1.5]}})
    for stage, iteration in (("prepare", -1), ("sft", -1), ("generate", 0), ("reference_logprobs", 0)):
        run.complete(stage, iteration, [])
    run.complete("regime", 0, [run.regime(0)])
    if len(scores) > 1:
        run.complete("train", 0, [], steps=3, margin_by_epoch=[1.0, 4.0])


def make_plan(**values: object) -> Plan:
    arms = {name: Arm(name) for name in ("sft", "other", "spin")}
    arms |= {"far": Arm("far", extrapolate="tuned", factor=1.5), "later": Arm("later")}
    return replace(Plan("T", Path("r.yaml"), {"dev": (0,), "test": (2, 3, 4)}, arms), **values)  # type: ignore[arg-type]


def test_interval_of_a_difference() -> None:
    """Mean 2, standard deviation 1, three seeds: 4.303 / √3 on either side."""
    found = Difference([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert str(found) == "+2.000 [-0.484, +4.484]"
    assert not found.is_above_zero
    assert str(Difference([0.5])) == "+0.500"
    assert str(Difference([])) == "–"


def test_differences_are_paired_by_seed() -> None:
    """Seed 1: 0.9 − 0.5, seed 3: 0.7 − 0.4. Seed 2 has no baseline, and seed 4 no value."""
    found = difference({1: 0.9, 2: 0.1, 3: 0.7}, {1: 0.5, 3: 0.4, 4: 0.0})
    assert found.seeds == pytest.approx([0.4, 0.3])


@pytest.mark.parametrize(
    ("extrapolated", "ahead"),
    [
        # Leads over tuned: 0.10, 0.11, 0.12, so 0.11 ± 4.303 · 0.01 / √3 = 0.025.
        ([0.50, 0.50, 0.50], True),
        ([0.60, 0.60, 0.60], False),  # leads 0, 0.01, 0.02: 0.01 ± 0.025
        ([0.40, 0.50, 0.72], False),  # leads 0.20, 0.11, −0.10
    ],
)
def test_ahead_means_above_tuned_and_above_extrapolated_fine_tuning(extrapolated: list[float], ahead: bool) -> None:
    plan = make_plan(tuned="sft", extrapolated="far")
    seeds = (2, 3, 4)
    values = {"spin": [0.60, 0.61, 0.62], "sft": [0.5, 0.5, 0.5], "far": extrapolated}
    by_player = {(arm, 0): dict(zip(seeds, of_arm, strict=True)) for arm, of_arm in values.items()}
    assert is_ahead(plan, "spin", 0, by_player) == ahead
    assert not is_ahead(make_plan(tuned="sft"), "spin", 0, by_player)  # no extrapolated baseline


def test_the_test_seeds_take_only_the_arms_of_the_report() -> None:
    assert make_plan().reported("dev") == ["sft", "other", "spin", "later"]  # nothing to extrapolate yet
    assert make_plan(tuned="other").reported("dev") == ["sft", "other", "spin", "far", "later"]
    for incomplete in ({}, {"tuned": "sft", "extrapolated": "far"}, {"tuned": "sft", "report": ("spin",)}):
        with pytest.raises(SystemExit, match="chosen on the dev seeds"):
            make_plan(**incomplete).reported("test")
    chosen = make_plan(tuned="other", extrapolated="far", report=("later",))
    assert chosen.reported("test") == ["sft", "other", "far", "later"]


def test_the_report_of_the_test_seeds(tmp_path: Path) -> None:
    """The arm `spin` has runs, but the plan does not report it. Seed 0 is a dev seed."""
    plan = make_plan(tuned="other", extrapolated="far", report=("later",), metric="task_score")
    scores = {"sft": 0.5, "other": 0.6, "far": 0.65, "later": 0.9, "spin": 1.0}
    for seed in (0, 2, 3):
        for arm, score in scores.items():
            write_run(tmp_path / f"seed-{seed}" / arm, [0.1, score + seed / 100])
    text = write_report(plan, "test", tmp_path, tmp_path / "test.md", 1)
    assert "spin |" not in text.replace("spinlm", "")
    # Means of seeds 2 and 3: 0.9 + 0.025; the leads over other are 0.3 for both seeds, and 0.25 over far.
    assert "| later | iteration 0 | 2 | 3 | 0.925 | 0.075 |" in text
    cells = "| +0.825 [+0.761, +0.889] | +0.300 [+0.300, +0.300] | +0.300, +0.300 | +0.250 [+0.250, +0.250] |"
    assert f"| later | iteration 0 | 2 {cells} – | +0.300 [+0.300, +0.300] | ahead |" in text
    assert "Seeds: 2, 3, 4." in text
    # β·margin of the last epoch: 0.5 times the margin.
    assert "| later | 0 | 0.25 | 3.00 | 0.00 | 1.50 | 2.00 |" in text


def test_a_run_that_has_not_ended_is_left_out(tmp_path: Path) -> None:
    plan = make_plan(seeds={"dev": (0, 1, 2, 3), "test": ()})
    scores = [0.15, 0.25, 0.35]
    write_run(tmp_path / "seed-0" / "arm", scores)
    write_run(tmp_path / "seed-1" / "arm", scores, iterations=4)
    write_run(tmp_path / "seed-2" / "arm", scores, iterations=4, go_on=False)  # stopped by itself
    runs = ended_runs(plan, "dev", tmp_path, "arm")
    assert runs.keys() == {0, 2}
    assert [runs[0].steps(player) for player in runs[0].players] == [0, 3, 6]


def test_a_run_that_the_plan_plays_for_longer_has_not_ended(tmp_path: Path) -> None:
    """One iteration is all that the dev seeds ask for; the test seeds ask for three."""
    plan = make_plan(iterations={"spin": 3}, settings={"dev": ("a=1",), "test": ("a=2",)})
    player = Player(plan, tmp_path)
    arm = plan.arms["spin"]
    write_run(player.run_folder(2, "spin"), [0.1, 0.2])
    assert player.has_ended("dev", 2, arm) and not player.has_ended("test", 2, arm)
    write_run(player.run_folder(3, "spin"), [0.1, 0.2, 0.3, 0.4])
    assert player.has_ended("test", 3, arm)
    assert plan.settings_of("dev", arm) == ["a=1"]
    assert plan.settings_of("test", arm) == ["a=2", "selfplay.iterations=3"]


def test_task_scores_by_temperature(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5])
    sampled = {"sampled_task_score": 0.3, "task_score_by_temperature": {"0.7": 0.4}}
    write_json(tmp_path / "start" / "eval.json", {"task_score": 0.5, **sampled})
    metrics = Run(RunDir(tmp_path)).metrics(-1)
    assert {key: value for key, value in metrics.items() if "@" in key} == {
        "task_score@0": 0.5,
        "task_score@0.7": 0.4,
        "task_score@1": 0.3,
    }


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans(path: Path, tmp_path: Path) -> None:
    """Every run of a plan has a recipe that can be read, and is made from runs that are played before it."""
    plan = Plan.read(path)
    data = tmp_path / "data.jsonl" if plan.needs_file else None
    complete = replace(
        plan,
        tuned=plan.tuned or plan.first,
        extrapolated=plan.extrapolated or plan.first,
        report=tuple(plan.arms),
    )
    for split in ("dev", "test"):
        played = complete.played(split)
        player, before = Player(complete, tmp_path, data), set[str]()
        for arm in played:
            command = player.command(split, 1, arm)
            assert set(complete.parents(arm, played)) <= before
            before.add(arm.name)
            if not arm.extrapolate:
                recipe = command.index(str(plan.recipe))
                settings = command[recipe + 1 : command.index("--run-dir")]
                assert load_recipe(plan.recipe, settings).seed == 1
                assert ("--start-from" in command) == (arm.name != plan.first)


def test_sources_of_an_arm() -> None:
    """An arm starts from `start_from` if that is played, else from the first arm."""
    arms = [Arm("sft"), Arm("a"), Arm("b", start_from="a"), Arm("c", only_pairs_of="b"), Arm("d", extrapolate="tuned")]
    plan = make_plan(arms={arm.name: arm for arm in arms}, tuned="a", extrapolated="d", report=("c",))
    assert [arm.name for arm in plan.played("test")] == ["sft", "a", "b", "c", "d"]
    assert [plan.parents(arm, arms) for arm in arms] == [[], ["sft"], ["a"], ["b", "b"], ["a"]]
    assert plan.parents(arms[2], [arms[0], arms[2]]) == ["sft"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("metrics: a", "metrics is unknown"),
        ("arms: {sft: {start: own}}", "arm sft: start is unknown"),
        ("report: [spam]", "there is no arm spam"),
        ("seeds: {dev: [1, 2], test: [2]}", "seed 2 is a dev seed and a test seed"),
    ],
)
def test_mistakes_in_a_plan_are_refused(change: str, message: str, tmp_path: Path) -> None:
    plan = {"title": "T", "recipe": "recipes/quickstart.yaml", "seeds": "{dev: [0]}", "arms": "{sft: {}}"}
    key, _, value = change.partition(": ")
    path = tmp_path / "plan.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in (plan | {key: value}).items()))
    with pytest.raises(SystemExit, match=message):
        Plan.read(path)


def test_records_are_compared_line_by_line() -> None:
    """Line 1: 1 of 2 fields right. Line 2: all right. Line 3 is missing: 1.5 / 3, and 1 of 3 whole records."""
    reference = '{"a":1,"b":2}\n{"a":3}\n{"a":4}'
    response = '{"a":1,"b":7}\n\n{"a":3.0}'
    assert scorers.records(response, reference) == pytest.approx(0.5)
    assert scorers.whole_records(response, reference) == pytest.approx(1 / 3)
    assert scorers.records(reference + '\n{"a":5}', reference) == pytest.approx(3 / 4)  # one line too many
    assert scorers.records("", reference) == 0


def test_equations_of_the_reference_count_once() -> None:
    reference = "<<48/2=24>>24 <<48+24=72>>72\n#### 72"
    assert scorers.equations(reference, reference) == 1
    assert scorers.equations("<<24*1=24>>", reference) == 0.5  # another way to a result of the reference
    assert scorers.equations("<<48/2=24>><<48/2=24>><<48/2=24>>", reference) == pytest.approx(1 / 3)
    assert scorers.equations("<<48/2=25>><<50+22=72>>", reference) == 0.5  # wrong, and right
    assert scorers.equations("72", reference) == 0
    assert scorers.equations("no", "none") == 1 and scorers.equations("<<1+1=2>>", "none") == 0


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        ("1/3=0.33", True),  # rounded as in the data
        ("1,000*$2=2,000", True),
        ("20*5%=1", True),
        ("-(2+3)=-5", True),
        ("0.1+0.2=0.3", True),
        ("2+2=5", False),
        ("2**9999=1", False),
        ("1/0=0", False),
        ("((((=1", False),
        ("7=7.0", True),
    ],
)
def test_arithmetic(equation: str, right: bool) -> None:
    assert scorers.arithmetic(f"so <<{equation}>>") == right


def test_shares_of_a_rationale() -> None:
    assert scorers.arithmetic("<<1+1=2>> <<1+1=3>>") == 0.5 and scorers.arithmetic("so 3 apples") == 0
    assert scorers.ending("so 3 apples\n#### 3") == 1 and scorers.ending("so 3 apples\n####") == 0
