"""MT-Bench (arXiv 2306.05685): players answer questions of two turns, and a judge marks or compares the answers.

Under a player's folder, mt-bench/ holds what it answered and what the judge said, a line for each. The name of a file
ends in a digest of all that its lines depend on: whatever changes begins a new file, and nothing is asked twice.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinlm.config import Recipe
from spinlm.errors import DataError, RunError
from spinlm.evals.benchmarks import Score, add_scores
from spinlm.evals.exam import Answers, Exam, player_name
from spinlm.evals.judge import Judge, JudgeError, Verdict, read_choice, read_mark
from spinlm.evals.judge_prompts import prompt_name
from spinlm.evals.questions import read_questions, read_references
from spinlm.evals.verdicts import Asked, Place, ask_about, collect, verdicts_file
from spinlm.files import short_digest
from spinlm.journal import Journal
from spinlm.rundir import RunDir

SUITE = "mt-bench"
PAIRWISE_SUITE = "mt-bench pairwise"
MAX_NEW_TOKENS = 1024

Marks = Mapping[Place, float | None]
"""A player's marks by question and turn; None where the verdict could not be read."""


@dataclass(frozen=True)
class _Sitting:
    """An exam, whoever judges it, and what there is to say of it."""

    exam: Exam
    judge: Judge
    answers: Mapping[int, Answers]  # by player
    settings: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


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
    sitting = _Sitting(exam, judge, answers, settings)
    for player in players:
        sitting.remarks.extend(exam.remarks(player, answers[player]))
    if without:
        categories = ", ".join(sorted({question.category for question in without}))
        sitting.remarks.append(
            f"no reference answer to {len(without)} of the questions ({categories}): there the judge is on its own"
        )
    if pairwise:
        for player in players[1:]:
            _compare(sitting, player, players[0])
    else:
        _mark(sitting, players)
    return sitting.remarks


# Each player by itself


def _mark(sitting: _Sitting, players: Sequence[int]) -> None:
    """Have every answer marked; keep the scores, in points."""
    exam = sitting.exam
    marks: dict[int, Marks] = {}
    counts: dict[int, dict[str, Any]] = {}
    for player in players:
        answers = sitting.answers[player]
        asked = [
            ask_about(sitting.judge, exam.references, question, turn, {"answer": answers[question.id].turns})
            for question in exam.questions
            for turn in range(1, len(answers[question.id].turns) + 1)
        ]
        journal = Journal(exam.folder(player) / verdicts_file("judgements", sitting.judge, exam, [player]))
        verdicts = collect(journal, sitting.judge, asked, read_mark, f"{player_name(player)}: judge")
        marks[player] = {item.place: verdict.value for item, verdict in zip(asked, verdicts, strict=True)}
        counts[player] = _counts(exam, verdicts, len(asked), journal)
    if all(mark is None for given in marks.values() for mark in given.values()):
        raise _nothing_readable(sitting.judge, journal)
    for player in players:
        if scores := _scores(sitting, marks[player], counts[player]):
            add_scores(exam.run, player, SUITE, scores, anew=True)
        _remark_unreadable(sitting, player_name(player), list(marks[player].values()))
    for player in players[1:]:
        sitting.remarks.append(_lead(marks, player, players[0]))


def _scores(sitting: _Sitting, marks: Marks, counts: dict[str, Any]) -> dict[str, Score]:
    """Mean marks, over all and by turn and category, as far as there are any."""
    exam = sitting.exam
    categories = dict.fromkeys(question.category for question in exam.questions)
    tasks: dict[str, dict[int | str, list[float]]] = {
        task: defaultdict(list) for task in ("overall", "turn 1", "turn 2", *categories)
    }
    for question in exam.questions:
        for turn in range(1, len(question.turns) + 1):
            mark = marks.get((question.id, turn))
            if mark is not None:
                for task in ("overall", f"turn {turn}", question.category):
                    tasks[task][question.id].append(mark)
    return {
        task: Score(*mean_and_error(list(groups.values())), "points", len(groups), sitting.settings, counts)
        for task, groups in tasks.items()
        if groups
    }


def _lead(marks: Mapping[int, Marks], player: int, other: int) -> str:
    """By how much a player is ahead of another, on the answers that both have a mark for."""
    groups: dict[int | str, list[float]] = defaultdict(list)
    for (question, turn), mark in marks[player].items():
        against = marks[other].get((question, turn))
        if mark is not None and against is not None:
            groups[question].append(mark - against)
    name = f"{player_name(player)} − {player_name(other)}"
    if not groups:
        return f"{name}: no answer has a mark for both"
    value, error = mean_and_error(list(groups.values()))
    if error is None:
        return f"{name}: {value:+.2f} points, on one question"
    noise = "" if abs(value) > 2 * error else "; that is within the noise"
    return f"{name}: {value:+.2f} ± {error:.2f} points, paired over {len(groups)} questions{noise}"


def mean_and_error(groups: Sequence[Sequence[float]]) -> tuple[float, float | None]:
    """Mean of all values, and its standard error where the values of a group (a question) are not independent.

    With n groups of sums s and sizes k, the mean is m = Σs / Σk and its variance n/(n−1) Σ(s − m k)² / (Σk)². None for
    the error of a single group.
    """
    n, total = len(groups), sum(len(group) for group in groups)
    mean = sum(sum(group) for group in groups) / total
    if n < 2:
        return mean, None
    squares = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return mean, (n / (n - 1) * squares) ** 0.5 / total


# Two players against each other


def _compare(sitting: _Sitting, player: int, other: int) -> None:
    """Have every answer of a player compared with another's, in both orders; keep the win rate."""
    exam, judge = sitting.exam, sitting.judge
    ours, theirs = sitting.answers[player], sitting.answers[other]
    what = f"{player_name(player)} against {player_name(other)}"
    results: dict[Place, float | None] = {}
    asked: list[Asked] = []
    for question in exam.questions:
        mine, its = ours[question.id].turns, theirs[question.id].turns
        for turn in range(1, min(len(mine), len(its)) + 1):
            if mine[:turn] == its[:turn]:
                results[question.id, turn] = 0.5  # a tie, whoever judges
                continue
            for shown in ({"answer_a": mine, "answer_b": its}, {"answer_a": its, "answer_b": mine}):
                asked.append(ask_about(judge, exam.references, question, turn, shown))
    identical = len(results)
    name = verdicts_file(f"against-{exam.run.iteration(other).name}", judge, exam, [player, other])
    journal = Journal(exam.folder(player) / name)
    verdicts = collect(journal, judge, asked, read_choice, f"{what}: judge")
    choices = [verdict.value for verdict in verdicts]
    games = list(zip(choices[::2], choices[1::2], strict=True))
    decided = [outcome(*game) for game in games]
    results |= {item.place: result for item, result in zip(asked[::2], decided, strict=True)}
    if not results:
        raise DataError(f"{what}: there is no question that both answered")
    if games and all(result is None for result in decided):
        raise _nothing_readable(judge, journal)
    groups: dict[int | str, list[float]] = defaultdict(list)
    for (question_id, _), result in results.items():
        if result is not None:
            groups[question_id].append(result)
    tally = Counter(results.values())
    counts = {
        **_counts(exam, verdicts, len(results), journal),
        "wins": tally[1.0],
        "ties": tally[0.5],
        "losses": tally[0.0],
        "identical": identical,
        "orders_differ": sum(None not in game and game not in AGREED for game in games),
        "chose_first": choices.count("A"),
        "chose_second": choices.count("B"),
    }
    score = Score(*mean_and_error(list(groups.values())), "win rate", len(groups), sitting.settings, counts)
    add_scores(exam.run, player, PAIRWISE_SUITE, {f"against {player_name(other)}": score})
    sitting.remarks.append(
        f"{what}: {tally[1.0]} won, {tally[0.5]} tied ({identical} with the same answer), {tally[0.0]} lost. With the "
        f"players swapped the judge contradicted itself in {counts['orders_differ']} of {len(games)} games; it chose "
        f"the answer shown first {counts['chose_first']} times, the second {counts['chose_second']} times"
    )
    _remark_unreadable(sitting, what, choices)


AGREED = {("A", "B"): 1.0, ("B", "A"): 0.0, ("C", "C"): 0.5}
"""What two verdicts that agree mean to a player that was A and then B."""


def outcome(first: str | None, second: str | None) -> float | None:
    """How a game ended for a player that was A in the first verdict and B in the second.

    1 where it won both, 0 where it lost both, else 0.5; None where a verdict could not be read.
    """
    if first is None or second is None:
        return None
    return AGREED.get((first, second), 0.5)


# What both have in common


def _counts(exam: Exam, verdicts: Sequence[Verdict[Any]], judged: int, journal: Journal) -> dict[str, Any]:
    """What a score leaves out, and where its verdicts are."""
    return {
        "unparsable": sum(verdict.value is None for verdict in verdicts),
        "asked_again": sum(len(verdict.replies) > 1 for verdict in verdicts),
        "unanswered": sum(len(question.turns) for question in exam.questions) - judged,
        "verdicts": journal.path.name,
    }


def _remark_unreadable(sitting: _Sitting, what: str, values: Sequence[object]) -> None:
    missing = sum(value is None for value in values)
    if missing:
        sitting.remarks.append(f"{what}: {missing} of {len(values)} verdicts could not be read and do not count")


def _nothing_readable(judge: Judge, journal: Journal) -> JudgeError:
    unread = next(record for record in journal.records if record["verdict"] is None)
    reply = " ".join(unread["replies"][0].split())
    begun = f"begins with {reply[:120]!r}" if reply else "is empty"
    return JudgeError(
        f"{judge.model}: its verdicts could not be read, so there is no score. The first reply {begun}; all are in "
        f"{journal.path}. Take a stronger judge, give it more room with --judge-tokens, or word its prompts so that it "
        "follows them with --judge-prompts"
    )
