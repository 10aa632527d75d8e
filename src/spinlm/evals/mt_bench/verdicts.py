"""Verdicts on the answers of an exam: what the judge is asked, and what it said so far."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from spinlm.distributed.progress import track
from spinlm.errors import RunError
from spinlm.evals.mt_bench.exam import Exam
from spinlm.evals.mt_bench.judge import Judge, Verdict
from spinlm.evals.mt_bench.prompts import prompt_name
from spinlm.evals.mt_bench.questions import Question, References
from spinlm.rundir.journal import Journal
from spinlm.rundir.records import Message
from spinlm.utils.atomic import short_digest

Value = TypeVar("Value", float, str)

Place = tuple[int | str, int]
"""A question's id, and a turn from 1."""


@dataclass(frozen=True)
class Asked:
    """Something to ask the judge."""

    place: Place
    prompt: str  # the name of the judge's prompt
    messages: list[Message]

    @property
    def digest(self) -> str:
        return short_digest(self.messages)


def ask_about(
    judge: Judge, references: References, question: Question, turn: int, shown: Mapping[str, Sequence[str]]
) -> Asked:
    """What to ask about a turn (from 1).

    Args:
        judge: whose prompts are used.
        references: the one prompt or the other is used, according to whether the question has one.
        question: what was answered.
        turn: which answer to judge; those before it are shown, too.
        shown: a player's answers as `answer`, or those of two as `answer_a` and `answer_b`.
    """
    reference = references.get(question.id, ())
    name = prompt_name(pairwise=len(shown) > 1, turn=turn, reference=bool(reference))
    texts = {"question": question.turns[0], **{kind: answers[0] for kind, answers in shown.items()}}
    for number in range(1, turn + 1):
        texts[f"question_{number}"] = question.turns[number - 1]
        texts |= {f"{kind}_{number}": answers[number - 1] for kind, answers in shown.items()}
    texts |= {f"ref_answer_{number}": text for number, text in enumerate(reference, start=1)}
    return Asked((question.id, turn), name, judge.prompts[name].messages(texts))


def verdicts_file(kind: str, judge: Judge, exam: Exam, players: Sequence[int]) -> str:
    """Name of a file of verdicts; all that they depend on has a share in it."""
    made_from = [
        *(exam.fingerprint(player) for player in players),
        [judge.host, judge.model, judge.max_tokens, judge.prompts_digest, dict(judge.options)],
    ]
    model = re.sub(r"[^A-Za-z0-9.]+", "-", judge.model).strip("-.")[-60:]
    return f"{kind}-{model}-{short_digest(made_from)}.jsonl"


def collect(
    journal: Journal, judge: Judge, asked: Sequence[Asked], read: Callable[[str], Value | None], what: str
) -> list[Verdict[Value]]:
    """The judge's verdicts, in order: those in the journal, and those it gives now, which are added there.

    Raises:
        JudgeError: the judge cannot be reached, or refuses.
        RunError: the journal holds something else.
        StoppedError: the user asked to stop.
    """
    try:
        done = {row["asked"]: Verdict(row["verdict"], tuple(row["replies"])) for row in journal.records}
    except (KeyError, TypeError) as error:
        raise RunError(f"{journal.path}: not verdicts ({error!r}). Delete it, and run again to make it anew") from error
    new = list({item.digest: item for item in asked if item.digest not in done}.values())

    with track(what, len(asked), already=len(asked) - len(new), unit="characters") as advance:

        def record(number: int, verdict: Verdict[Value]) -> None:
            item = new[number]
            question, turn = item.place
            journal.add(
                {
                    "question_id": question,
                    "turn": turn,
                    "judge": [judge.model, item.prompt],
                    "verdict": verdict.value,
                    "replies": list(verdict.replies),
                    "asked": item.digest,
                }
            )
            done[item.digest] = verdict
            advance(1, sum(len(reply) for reply in verdict.replies))

        if new:
            judge.ask([item.messages for item in new], read, record)
    return [done[item.digest] for item in asked]
