"""An exam that is judged: what its two kinds of judgement, marks and games, have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinlm.evals.mt_bench.exam import Answers, Exam
from spinlm.evals.mt_bench.judge import Judge, JudgeError, Verdict
from spinlm.rundir.journal import Journal


@dataclass(frozen=True)
class Sitting:
    """An exam, whoever judges it, and what there is to say of it."""

    exam: Exam
    judge: Judge
    answers: Mapping[int, Answers]  # by player
    settings: dict[str, Any]
    remarks: list[str] = field(default_factory=list)


def counts_of(exam: Exam, verdicts: Sequence[Verdict[Any]], judged: int, journal: Journal) -> dict[str, Any]:
    """What a score leaves out, and where its verdicts are."""
    return {
        "unparsable": sum(verdict.value is None for verdict in verdicts),
        "asked_again": sum(len(verdict.replies) > 1 for verdict in verdicts),
        "unanswered": sum(len(question.turns) for question in exam.questions) - judged,
        "verdicts": journal.path.name,
    }


def remark_unreadable(sitting: Sitting, what: str, values: Sequence[object]) -> None:
    missing = sum(value is None for value in values)
    if missing:
        sitting.remarks.append(f"{what}: {missing} of {len(values)} verdicts could not be read and do not count")


def nothing_readable(judge: Judge, journal: Journal) -> JudgeError:
    unread = next(record for record in journal.records if record["verdict"] is None)
    reply = " ".join(unread["replies"][0].split())
    begun = f"begins with {reply[:120]!r}" if reply else "is empty"
    return JudgeError(
        f"{judge.model}: its verdicts could not be read, so there is no score. The first reply {begun}; all are in "
        f"{journal.path}. Take a stronger judge, give it more room with --judge-tokens, or word its prompts so that it "
        "follows them with --judge-prompts"
    )


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
