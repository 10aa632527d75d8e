"""Marks: the judge gives each answer of a player points."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from spinlm.evals.mt_bench.judge import read_mark
from spinlm.evals.mt_bench.sitting import Sitting, counts_of, mean_and_error, nothing_readable, remark_unreadable
from spinlm.evals.mt_bench.verdicts import Place, ask_about, collect, verdicts_file
from spinlm.evals.scores import Score, add_scores
from spinlm.rundir.journal import Journal
from spinlm.rundir.stage_graph import player_name

SUITE = "mt-bench"

Marks = Mapping[Place, float | None]
"""A player's marks by question and turn; None where the verdict could not be read."""


def mark(sitting: Sitting, players: Sequence[int]) -> None:
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
        counts[player] = counts_of(exam, verdicts, len(asked), journal)
    if all(mark is None for given in marks.values() for mark in given.values()):
        raise nothing_readable(sitting.judge, journal)
    for player in players:
        if scores := _scores(sitting, marks[player], counts[player]):
            add_scores(exam.run, player, SUITE, scores, anew=True)
        remark_unreadable(sitting, player_name(player), list(marks[player].values()))
    for player in players[1:]:
        sitting.remarks.append(_lead(marks, player, players[0]))


def _scores(sitting: Sitting, marks: Marks, counts: dict[str, Any]) -> dict[str, Score]:
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
