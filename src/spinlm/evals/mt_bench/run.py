"""Run MT-Bench on the players of a run."""

from collections.abc import Sequence
from pathlib import Path

from spinlm.errors import RunError
from spinlm.evals.mt_bench.grading import PAIRWISE_SUITE, SUITE, JudgeRun, grade_pairwise, grade_single
from spinlm.evals.mt_bench.judge import Judge
from spinlm.evals.mt_bench.questions import ResponseSet, read_questions, read_references
from spinlm.model.run import Run
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.atomic import short_digest


def suite_name(pairwise: bool) -> str:
    """Return the suite of the scores that `run_mt_bench` keeps."""
    return PAIRWISE_SUITE if pairwise else SUITE


def run_mt_bench(
    run: Run,
    players: Sequence[int],
    judge: Path,
    questions: Path,
    references: Path | None = None,
    *,
    limit: int | None = None,
    pairwise: bool = False,
    max_new_tokens: int = 1024,
) -> list[str]:
    """Measure players with MT-Bench, and keep their scores as benchmarks of the run.

    Args:
        run: the run.
        players: iterations whose players are measured, `START` for θ_0.
        judge: judge.yaml, the judge's settings.
        questions: MT-Bench's question.jsonl, or a file in its format.
        references: file with reference answers.
        limit: maximum number of questions.
        pairwise: compare every other player with the first one, instead of rating each response.
        max_new_tokens: maximum length of a response.

    Returns:
        Notes to show after the scores: what they leave out, and how the players compare.

    Raises:
        DataError: the questions, references or prompts cannot be used.
        JudgeError: the judge cannot be used or reached, refuses, or none of its judgments can be parsed.
        RunError: `pairwise` with fewer than two players.
        StoppedError: the user asked to stop.
    """
    if pairwise and len(players) < 2:
        raise RunError(
            f"--pairwise compares players, and {player_name(players[0])} is the only one. Name two players with "
            "--iteration; `start` and `best` may be the same one"
        )
    loaded = Judge.load(judge)
    all_questions = read_questions(questions)
    reference_answers = read_references(references, all_questions)
    chosen = all_questions[:limit]
    without_reference = [q.category for q in chosen if q.uses_reference and q.question_id not in reference_answers]
    settings = {
        **loaded.fingerprint,
        "questions": short_digest([question.fingerprint for question in all_questions]),
        "references": short_digest(sorted((str(key), turns) for key, turns in reference_answers.items()))
        if reference_answers
        else None,
        "without_reference": len(without_reference),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "seed": run.recipe.seed,
    }
    response_sets = {player: ResponseSet(run, player, all_questions, max_new_tokens) for player in players}
    if any(response_set.missing(chosen) for response_set in response_sets.values()):
        loaded.check()  # before the responses, which may take hours
    for response_set in response_sets.values():
        response_set.generate(chosen)
    notes = [note for response_set in response_sets.values() for note in response_set.notes(chosen)]
    if without_reference:
        names = ", ".join(sorted(set(without_reference)))
        notes.append(
            f"{len(without_reference)} questions ({names}) have no reference answer: the judge decides without one"
        )
    judge_run = JudgeRun(loaded, chosen, reference_answers, response_sets, settings, notes)
    if pairwise:
        for player in players[1:]:
            grade_pairwise(judge_run, player, players[0])
    else:
        grade_single(judge_run, players)
    return notes
