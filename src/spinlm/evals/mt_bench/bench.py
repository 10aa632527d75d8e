"""MT-Bench from its questions to the scores of players.

Under a player's folder, mt-bench/ holds what it answered and what the judge said, a line for each. The name of a file
ends in a digest of all that its lines depend on: whatever changes begins a new file, and nothing is asked twice.
"""

from collections.abc import Sequence
from pathlib import Path

from spinlm.errors import DataError, RunError
from spinlm.evals.mt_bench.exam import Exam
from spinlm.evals.mt_bench.games import compare
from spinlm.evals.mt_bench.judge import Judge
from spinlm.evals.mt_bench.marks import mark
from spinlm.evals.mt_bench.prompts import prompt_name
from spinlm.evals.mt_bench.questions import read_questions, read_references
from spinlm.evals.mt_bench.sitting import Sitting
from spinlm.recipe.schema import Recipe
from spinlm.rundir.layout import RunDir
from spinlm.rundir.stage_graph import player_name
from spinlm.utils.atomic import short_digest

MAX_NEW_TOKENS = 1024


def mt_bench(
    recipe: Recipe,
    run: RunDir,
    players: Sequence[int],
    judge: Judge,
    questions: Path | None,
    references: Path | None = None,
    *,
    limit: int | None = None,
    pairwise: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Measure players with MT-Bench, and keep their scores as benchmarks of the run.

    Args:
        recipe: the run's.
        run: the run folder.
        players: iterations whose players to measure, `START` for θ_0.
        judge: who marks.
        questions: MT-Bench's question.jsonl, or a file like it.
        references: reference answers to some of them.
        limit: take only so many questions.
        pairwise: compare every other player with the first one, instead of marking each by itself.
        max_new_tokens: longest answer.

    Returns:
        Lines to show beside the scores: what they leave out, and how the players compare.

    Raises:
        DataError: the questions or references cannot be used.
        JudgeError: the judge cannot be reached, refuses, or none of its verdicts can be read.
        RunError: `pairwise` with fewer than two players.
        StoppedError: the user asked to stop.
    """
    if pairwise and len(players) < 2:
        raise RunError(
            f"--pairwise compares players, and here is only one: {player_name(players[0])}. Name two of them with "
            "--iteration; `start` and `best` may be the same one"
        )
    everything = read_questions(questions)
    chosen = everything[:limit]
    known = read_references(references, everything)
    for question in chosen:
        for turn in range(1, len(question.turns) + 1):
            name = prompt_name(pairwise=pairwise, turn=turn, reference=question.id in known)
            if name not in judge.prompts:
                raise DataError(f"--judge-prompts: the file has no prompt named {name}, which these questions need")
    exam = Exam(recipe, run, everything, chosen, known, max_new_tokens)
    if any(exam.unanswered(player) for player in players):
        judge.check()  # before what may be hours of answering
    answers = {player: exam.answers(player) for player in players}
    without = [question for question in chosen if question.wants_reference and question.id not in known]
    settings = {
        "judge": judge.model,
        "endpoint": judge.host,
        "prompts": judge.prompts_digest,
        "judge_tokens": judge.max_tokens,
        "judge_options": dict(judge.options),
        "questions": short_digest([question.plain() for question in everything]),
        "references": short_digest(sorted((str(key), turns) for key, turns in known.items())) if known else None,
        "without_reference": len(without),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "seed": recipe.seed,
    }
    sitting = Sitting(exam, judge, answers, settings)
    for player in players:
        sitting.remarks.extend(exam.remarks(player, answers[player]))
    if without:
        categories = ", ".join(sorted({question.category for question in without}))
        sitting.remarks.append(
            f"no reference answer to {len(without)} of the questions ({categories}): there the judge is on its own"
        )
    if pairwise:
        for player in players[1:]:
            compare(sitting, player, players[0])
    else:
        mark(sitting, players)
    return sitting.remarks
