"""Promotion of players, and the comparisons, verdicts and tables made of them: literal values, worked out by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spinlm.errors import RunError
from spinlm.evals.heldout import summarize_greedy
from spinlm.model.run import Run
from spinlm.recipe.schema import Recipe
from spinlm.report.compare import compare_runs, last_player
from spinlm.report.run_data import run_data
from spinlm.report.summary import outcome, player_rows, verdict
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Example, HeldoutGreedy, to_line
from spinlm.rundir.stage_graph import START
from spinlm.stages.promote import compare, promote
from spinlm.utils.atomic import write_json


def response(key: str = "a", **changes: Any) -> HeldoutGreedy:
    values: dict[str, Any] = {
        "id": key,
        "token_ids": [1, 2],
        "text": "",
        "finished": True,
        "identical": False,
        "repeated_4grams": 0.0,
        "nll": 1.0,
        "task_score": 0.0,
    }
    return HeldoutGreedy(**values | changes)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    for stage, iteration in (("prepare", START), ("sft", START)):
        run.complete(stage, iteration, [])
    return run


def recipe(
    metric: str | None = "task_score",
    iterations: int = 3,
    scorer: str | None = "exact_match",
    guard: dict[str, float] | None = None,
    **select: Any,
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "evaluate": {"scorer": scorer},
            "selfplay": {
                "iterations": iterations,
                "select": {"metric": metric, "min_standard_errors": 1.0, **select},
                "guard": guard or {},
            },
        }
    )


@pytest.fixture
def play(run: RunDir) -> Callable[..., list[tuple[int, bool]]]:
    """Promotes players with these values on the same held-out prompts; returns (best, whether to go on) for each."""

    def play(
        start: Sequence[float], *players: Sequence[float], metric: str = "task_score", **select: Any
    ) -> list[tuple[int, bool]]:
        chosen = recipe(metric, scorer="exact_match" if metric == "task_score" else None, **select)
        run.root.mkdir(parents=True, exist_ok=True)
        write_json(run.recipe, chosen.model_dump(mode="json"))
        run.record_digest(run.recipe)
        field = "task_score" if metric == "task_score" else "nll"
        decisions = []
        for iteration, values in enumerate([start, *players], start=START):
            if iteration >= 0:
                for stage in ("generate", "reference_logprobs", "train"):
                    run.complete(stage, iteration, [])
            responses = [response(str(number), **{field: value}) for number, value in enumerate(values)]
            run.iteration(iteration).mkdir(parents=True, exist_ok=True)
            run.heldout_greedy(iteration).write_text("".join(map(to_line, responses)))
            write_json(run.eval_metrics(iteration), summarize_greedy(responses))
            run.complete("evaluate", iteration, [run.heldout_greedy(iteration), run.eval_metrics(iteration)])
            if iteration >= 0:
                go_on = promote(Run(chosen, run), iteration)
                decisions.append((run.metadata("promote", iteration)["best"], go_on))
                assert run.best() == decisions[-1][0]
        return decisions

    return play


def test_better_beyond_the_noise(play, run):
    """Differences 1, 1, 0, 0: lead ½, standard error √(1/3/4) = 0.289."""
    assert play([0, 0, 0, 1], [1, 1, 0, 1]) == [(0, True)]
    metadata = run.metadata("promote", 0)
    assert (metadata["metric"], metadata["baseline"], metadata["mean_difference"]) == ("task_score", START, 0.5)
    assert metadata["standard_error"] == pytest.approx((1 / 12) ** 0.5)
    assert run.best_link.readlink() == Path("iteration-0")


def test_better_inside_the_noise(play):
    """Differences 1, 0, 0, 0: lead ¼, standard error ¼, and ahead by one standard error is not by more than one."""
    assert play([0, 0, 0, 0], [1, 0, 0, 0]) == [(START, True)]


def test_how_much_noise_is_the_recipe_s(play):
    assert play([0, 0, 0, 0], [1, 0, 0, 0], min_standard_errors=0.9) == [(0, True)]


def test_noise_of_the_paired_difference_counts(play):
    """The prompts differ much from each other and the players little: lead ½ ± 0 on every prompt."""
    assert play([0.0, 0.5, 0.0, 0.5], [0.5, 1.0, 0.5, 1.0], min_standard_errors=100.0) == [(0, True)]


def test_worse(play, run):
    assert play([1, 1, 1, 1], [0, 0, 0, 1]) == [(START, True)]
    assert run.metadata("promote", 0)["mean_difference"] == -0.75


@pytest.mark.parametrize("new", [[1, 0, 1, 0], [0, 1, 0, 1]])
def test_tie_leaves_the_older_player_the_best(play, new):
    assert play([1, 0, 1, 0], new, min_standard_errors=0.0) == [(START, True)]


def test_lower_nll_is_better(play, run):
    assert play([2.0, 2.0, 3.0], [1.0, 1.5, 2.0], metric="heldout_nll") == [(0, True)]
    assert run.metadata("promote", 0)["mean_difference"] == pytest.approx(2.5 / 3)


def test_higher_nll_is_worse(play):
    assert play([1.0, 1.5, 2.0], [1.05, 1.55, 2.15], metric="heldout_nll") == [(START, True)]


def test_comparison_is_with_the_best_not_with_the_last(play, run):
    """Iteration 1 is worse than 0; iteration 2 is better than 1, but not than 0."""
    zero, one = [0] * 4, [1] * 4
    assert play(zero, one, [0.2] * 4, [0.9] * 4, patience=3) == [(0, True), (0, True), (0, True)]
    assert [run.metadata("promote", i)["baseline"] for i in range(3)] == [START, 0, 0]


def test_patience(play):
    worse = [0] * 4
    assert play([1] * 4, worse, worse, patience=2) == [(START, True), (START, False)]


def test_patience_of_one(play):
    assert play([0] * 4, [1] * 4, [1] * 4, patience=1) == [(0, True), (0, False)]


def test_a_better_player_renews_patience(play):
    assert play([0] * 4, [0] * 4, [1] * 4, [1] * 4, patience=2) == [(START, True), (1, True), (1, True)]


def test_a_player_that_has_collapsed_is_never_the_best_and_ends_the_run(play, run):
    """Its task score is far ahead, but the real responses have become 0.5 nats per token less likely."""
    play([0.0, 0.0], [0.5, 0.5])
    responses = [response(str(number), task_score=1.0, nll=1.5) for number in range(2)]
    for stage in ("generate", "reference_logprobs", "train"):
        run.complete(stage, 1, [])
    run.heldout_greedy(1).parent.mkdir(exist_ok=True)
    run.heldout_greedy(1).write_text("".join(map(to_line, responses)))
    write_json(run.eval_metrics(1), summarize_greedy(responses))
    run.complete("evaluate", 1, [run.heldout_greedy(1), run.eval_metrics(1)])
    assert promote(Run(recipe(guard={"max_nll_increase": 0.6}), run), 1) is True and run.best() == 1
    run.marker("promote", 1).unlink()
    assert promote(Run(recipe(), run), 1) is False and run.best() == 0
    assert "Iteration 1 collapsed and ended the run: held-out NLL 1.000 at the start, 1.500 now" in verdict(run)


def test_a_player_that_is_ahead_and_has_collapsed_is_not_called_behind(play, run):
    play([0.0, 0.0], [1.0, 1.0])
    run.marker("promote", 0).unlink()
    responses = [response(str(number), task_score=1.0, nll=1.5) for number in range(2)]
    run.heldout_greedy(0).write_text("".join(map(to_line, responses)))
    write_json(run.eval_metrics(0), summarize_greedy(responses))
    run.complete("evaluate", 0, [run.heldout_greedy(0), run.eval_metrics(0)])
    assert promote(Run(recipe(), run), 0) is False and run.best() == START
    assert "had collapsed. Iteration 0 collapsed" in verdict(run)
    assert "Closest" not in verdict(run)
    assert "Lower train.learning_rate" in verdict(run)
    extrapolated = {"name": "extrapolate", "run": "run", "iteration": 0, "factor": 3.0}
    write_json(run.recipe, json.loads(run.recipe.read_text()) | {"objective": extrapolated})
    run.record_digest(run.recipe)
    assert "Lower objective.factor" in verdict(run)


def test_promotion_is_decided_once(play, run):
    play([0] * 4, [1] * 4)
    run.heldout_greedy(START).write_text("")
    run.best_link.unlink()
    assert promote(Run(recipe(), run), 0) is True
    with_best = run.metadata("promote", 0)["best"]
    assert with_best == 0


def test_prompts_are_matched_by_id(run, play):
    """The order of the lines does not matter."""
    play([0.0, 1.0], [0.0, 1.0])
    lines = run.heldout_greedy(0).read_text().splitlines(keepends=True)
    run.heldout_greedy(0).write_text("".join(reversed(lines)))
    comparison = compare(Run(recipe(), run), 0, START)
    assert (comparison.mean_difference, comparison.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize(("scorer", "metric"), [("exact_match", "task_score"), (None, "heldout_nll")])
def test_metric_when_the_recipe_names_none(run, play, scorer, metric):
    play([0.0, 0.0], [1.0, 1.0])
    assert compare(Run(recipe(None, scorer=scorer), run), 0, START).metric == metric


def test_verdict_when_it_helped(play, run):
    play([0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 0, 1])
    text = verdict(run)
    assert text.startswith("Self-play helped: task score 0.250 at the start, 0.750 after iteration 0 (best).")
    assert "difference to the start: +0.500 ± 0.289" in text and "seed" in text


def test_verdict_of_the_control(play, run):
    play([0, 0, 0, 1], [1, 1, 0, 1])
    recipe = json.loads(run.recipe.read_text())
    write_json(run.recipe, recipe | {"objective": {"name": "sft"}})
    run.record_digest(run.recipe)
    assert verdict(run).startswith("More supervised fine-tuning helped: task score 0.250 at the start")


def test_verdict_names_the_player_that_was_the_best_before(play, run):
    play([3.0, 3.0], [2.0, 2.0], [1.5, 1.25], metric="heldout_nll")
    text = verdict(run)
    assert "more likely: held-out NLL 3.000 at the start, 1.375 after iteration 1 (best)" in text
    assert "difference to iteration 0: lower by 0.625 ± 0.125" in text


def test_verdict_of_likelihood_gives_the_direction(play, run):
    play([1.0, 1.0], [0.9, 1.05], metric="heldout_nll")
    assert "Difference: lower by 0.025 ± 0.075." in verdict(run)


def test_verdict_when_it_did_not_help(play, run):
    play([1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1])
    text = verdict(run)
    assert text.startswith("Self-play did not help. None of 2 iterations")
    assert "1 standard error of" in text and "Closest: iteration 1, +0.000 ± 0.000." in text


def test_verdict_after_one_iteration(play, run):
    play([1, 1], [0, 1], min_standard_errors=2.0)
    assert "2 standard errors of" in verdict(run) and "Difference: -0.500 ± 0.500." in verdict(run)


def test_verdict_when_the_scorer_cannot_distinguish_the_players(play, run):
    play([0, 0.5, 0], [0, 0.5, 0], [0, 0.5, 0])
    text = verdict(run)
    assert "same score on every prompt (task score 0.167)" in text and "±" not in text
    assert "Held-out NLL: 1.000 at the start, 1.000 after iteration 1" in text


def test_players_that_differ_on_one_prompt_do_not_have_the_same_scores(play, run):
    play([0, 0], [0, 0], [0, 1], min_standard_errors=2.0)
    assert "same score" not in verdict(run)


def test_the_outcome_in_a_few_words(play, run):
    assert outcome(run) is None
    play([0, 0, 0, 1], [1, 1, 0, 1])
    assert outcome(run) == "task score 0.250 → 0.750"


def test_the_outcome_where_nothing_was_better(play, run):
    play([1, 1], [1, 0])
    assert outcome(run) == "not better than the start"


def test_no_number_is_minus_nothing(play, run):
    play([0.0, 0.0001], [0.0, 0.0])
    assert "Difference: +0.000 ± 0.000." in verdict(run)


@pytest.fixture
def runs(play, run: RunDir, tmp_path: Path) -> Callable[..., tuple[RunDir, RunDir]]:
    """Two runs on the same held-out examples, with these values of their players."""

    def runs(ours: Sequence[Any], control: Sequence[Any], **select: Any) -> tuple[RunDir, RunDir]:
        folders = []
        for name, players in (("ours", ours), ("control", control)):
            write_heldout(run, len(players[0]))
            run.complete("prepare", START, [run.examples("heldout")])
            run.complete("sft", START, [])
            play(*players, **select)
            run.record_digest(run.recipe)
            folders.append(RunDir(tmp_path / name))
            run.root.rename(folders[-1].root)
        return folders[0], folders[1]

    return runs


def write_heldout(run: RunDir, number: int) -> None:
    run.examples("heldout").parent.mkdir(parents=True, exist_ok=True)
    user = [{"role": "user", "content": "p"}]
    examples = [Example(str(one), user, "r", [one], [2], "f:1") for one in range(number)]
    run.examples("heldout").write_text("".join(map(to_line, examples)))


@pytest.mark.parametrize(
    ("metric", "values", "baseline", "text"),
    [
        ("task_score", [1, 1, 0, 1], [0, 0, 0, 1], "ahead. Task score +0.500 ± 0.289"),
        ("task_score", [0, 0, 0, 1], [1, 1, 0, 1], "behind. Task score -0.500 ± 0.289"),
        ("task_score", [0, 1, 0, 1], [1, 0, 0, 1], "no difference beyond 1 standard error. Task score +0.000 ± 0.408"),
        ("heldout_nll", [1.0, 2.0], [2.0, 4.0], "ahead. Held-out NLL lower by 1.500 ± 0.500"),
        ("heldout_nll", [2.0, 4.0], [1.0, 2.0], "behind. Held-out NLL higher by 1.500 ± 0.500"),
    ],
)
def test_a_run_and_its_control(runs, metric, values, baseline, text):
    comparison = str(compare_runs(*runs([values, values], [baseline, baseline], metric=metric)))
    assert comparison.startswith(f"ours vs control after iteration 0: {text}")
    assert f"on {len(values)} held-out prompts" in comparison
    assert ("how likely the real responses" in comparison) == (metric == "heldout_nll")


def test_runs_are_compared_after_the_last_iteration_of_both(runs):
    """Neither the best players nor the last player of each run."""
    ours, control = runs([[0, 0], [1, 1], [0, 1], [1, 1]], [[0, 0], [1, 1], [1, 1]])
    comparison = compare_runs(ours, control)
    assert (comparison.iteration, comparison.mean_difference) == (1, -0.5)
    assert compare_runs(control, ours).mean_difference == 0.5


def test_players_that_collapsed_are_not_compared(runs):
    ours, control = runs([[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [1, 1]])
    metadata = control.metadata("promote", 1)
    decision = {
        name: metadata[name]
        for name in ("best", "go_on", "metric", "baseline", "mean_difference", "standard_error", "better")
    }
    control.complete("promote", 1, [], **decision, collapse="it repeats itself")
    assert compare_runs(ours, control).iteration == 0
    assert (last_player(ours), last_player(control)) == (1, 0)


def test_runs_that_cannot_be_compared(runs, tmp_path):
    ours, control = runs([[0, 1], [1, 1]], [[0, 1], [1, 1]])
    with pytest.raises(RunError, match="no run here"):
        compare_runs(ours, RunDir(tmp_path / "none"))
    control.marker("evaluate", 0).rename(tmp_path / "kept")
    with pytest.raises(RunError, match="no evaluated iteration in common"):
        compare_runs(ours, control)
    (tmp_path / "kept").rename(control.marker("evaluate", 0))
    recipe = json.loads(control.recipe.read_text())
    write_json(control.recipe, recipe | {"evaluate": recipe["evaluate"] | {"scorer": "json_fields"}})
    control.record_digest(control.recipe)
    with pytest.raises(
        RunError, match=r"measured differently:\n  evaluate.scorer: was .json_fields., is .exact_match."
    ):
        compare_runs(ours, control)
    write_json(control.recipe, recipe)
    control.record_digest(control.recipe)
    user = [{"role": "user", "content": "other data, whose rows have the same ids"}]
    others = [Example(str(one), user, "r", [8], [one], "f:1") for one in range(2)]
    control.examples("heldout").write_text("".join(map(to_line, others)))
    control.complete("prepare", START, [control.examples("heldout")])
    with pytest.raises(RunError, match="share 0 held-out examples, of 2 and 2"):
        compare_runs(ours, control)
    control.heldout_greedy(0).write_text("")
    with pytest.raises(RunError, match=r"heldout_greedy\.jsonl"):
        compare_runs(ours, control)


def test_verdict_before_anything_is_judged(run):
    assert verdict(run) == "No iteration has been evaluated yet."


def test_rows_are_the_players_so_far(play, run):
    play([0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0])
    assert [(row.name, row.best, row.metrics["task_score"]) for row in player_rows(run)] == [
        ("start", False, 0.25),
        ("iteration 0", True, 0.75),
        ("iteration 1", False, 0.0),
    ]


def side_by_side(run: RunDir, prompts: int, **options: bool) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The prompt, the real response, and each player with its response."""
    run.complete("prepare", START, [run.examples("heldout")])
    for t in (START, 0, 1):
        if run.marker("evaluate", t).exists():
            run.complete("evaluate", t, [run.heldout_greedy(t), run.eval_metrics(t)])
    return [
        (shown.messages[-1]["content"], shown.real, [(player, text) for player, text, _ in shown.responses])
        for shown in run_data(run).side_by_side(prompts, **options)
    ]


def test_side_by_side_shows_prompts_with_different_responses_first(play, run):
    play([0, 0, 0], [1, 1, 1], [1, 1, 1])
    run.examples("heldout").parent.mkdir(exist_ok=True)
    with run.examples("heldout").open("w") as file:
        for key in "abc":
            file.write(json.dumps({"id": key, "messages": [{"content": f"prompt {key}"}], "response": key * 2}) + "\n")
    for iteration, texts in ((START, "xyz"), (0, "xYz"), (1, "XYZ")):
        responses = [response(key, text=text) for key, text in zip("abc", texts, strict=True)]
        run.heldout_greedy(iteration).write_text("".join(map(to_line, responses)))
    assert side_by_side(run, 2, all_players=False) == [
        ("prompt b", "bb", [("start", "y"), ("iteration 0", "Y")]),
        ("prompt a", "aa", [("start", "x"), ("iteration 0", "x")]),
    ]
    (prompt, _, responses), *_ = side_by_side(run, 2)
    assert (prompt, responses[-1]) == ("prompt b", ("iteration 1", "Y"))


def test_a_truncated_response_is_marked(play, run):
    play([0], [1])
    run.examples("heldout").parent.mkdir(exist_ok=True)
    run.examples("heldout").write_text(to_line(Example("a", [{"role": "user", "content": "p"}], "r", [1], [2], "f:1")))
    for iteration, finished in ((START, False), (0, True)):
        run.heldout_greedy(iteration).write_text(to_line(response("a", text="on and on", finished=finished)))
    (_, _, responses), *_ = side_by_side(run, 1)
    assert responses == [("start", "on and on … (cut off at 2 tokens)"), ("iteration 0", "on and on")]


def test_side_by_side_keeps_unusual_line_ends_in_texts(play, run):
    play([0], [1])
    text = "a\u2028b\u2029c\x85d\x1ce\r\nf"
    run.examples("heldout").parent.mkdir(exist_ok=True)
    run.examples("heldout").write_bytes(
        to_line(Example("a", [{"role": "user", "content": text}], text, [1], [2], "f:1")).encode()
    )
    for iteration in (START, 0):
        run.heldout_greedy(iteration).write_bytes(to_line(response("a", text=text)).encode())
    assert side_by_side(run, 1) == [(text, text, [("start", text), ("iteration 0", text)])]
