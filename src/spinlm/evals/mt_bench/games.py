"""Games: the judge compares the answers of two players, in both orders."""

from collections import Counter, defaultdict

from spinlm.errors import DataError
from spinlm.evals.mt_bench.judge import read_choice
from spinlm.evals.mt_bench.sitting import Sitting, counts_of, mean_and_error, nothing_readable, remark_unreadable
from spinlm.evals.mt_bench.verdicts import Asked, Place, ask_about, collect, verdicts_file
from spinlm.evals.scores import Score, add_scores
from spinlm.rundir.journal import Journal
from spinlm.rundir.stage_graph import player_name

SUITE = "mt-bench pairwise"


def compare(sitting: Sitting, player: int, other: int) -> None:
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
        raise nothing_readable(judge, journal)
    groups: dict[int | str, list[float]] = defaultdict(list)
    for (question_id, _), result in results.items():
        if result is not None:
            groups[question_id].append(result)
    tally = Counter(results.values())
    counts = {
        **counts_of(exam, verdicts, len(results), journal),
        "wins": tally[1.0],
        "ties": tally[0.5],
        "losses": tally[0.0],
        "identical": identical,
        "orders_differ": sum(None not in game and game not in AGREED for game in games),
        "chose_first": choices.count("A"),
        "chose_second": choices.count("B"),
    }
    score = Score(*mean_and_error(list(groups.values())), "win rate", len(groups), sitting.settings, counts)
    add_scores(exam.run, player, SUITE, {f"against {player_name(other)}": score})
    sitting.remarks.append(
        f"{what}: {tally[1.0]} won, {tally[0.5]} tied ({identical} with the same answer), {tally[0.0]} lost. With the "
        f"players swapped the judge contradicted itself in {counts['orders_differ']} of {len(games)} games; it chose "
        f"the answer shown first {counts['chose_first']} times, the second {counts['chose_second']} times"
    )
    remark_unreadable(sitting, what, choices)


AGREED = {("A", "B"): 1.0, ("B", "A"): 0.0, ("C", "C"): 0.5}
"""What two verdicts that agree mean to a player that was A and then B."""


def outcome(first: str | None, second: str | None) -> float | None:
    """How a game ended for a player that was A in the first verdict and B in the second.

    1 where it won both, 0 where it lost both, else 0.5; None where a verdict could not be read.
    """
    if first is None or second is None:
        return None
    return AGREED.get((first, second), 0.5)
