"""Rate responses one by one (`grade_single`) or compare two players (`grade_pairwise`), and keep the scores.

The judgments are in journals in the player's folder. The name of a journal contains a digest of everything that a
judgment depends on, so that no request is sent twice and no judgment is used for other settings.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from spinlm.distributed.progress import track
from spinlm.errors import DataError, shortened
from spinlm.evals.mt_bench.judge import Judge, JudgeError, prompt_name
from spinlm.evals.mt_bench.questions import Question, QuestionId, References, ResponseSet
from spinlm.evals.scores import Score, add_scores
from spinlm.rundir.records import Journal, Message
from spinlm.utils.atomic import short_digest
from spinlm.utils.statistics import clustered_mean

SUITE, PAIRWISE_SUITE = "mt-bench", "mt-bench pairwise"

Turn = tuple[QuestionId, int]
"""A question's id, and the number of a turn from 1."""

Value = TypeVar("Value", float, str)

Values = Mapping[Turn, float | None]
"""A rating or result for each turn; None if the verdict could not be parsed."""

CONSISTENT_RESULTS = {("A", "B"): 1.0, ("B", "A"): 0.0, ("C", "C"): 0.5}
"""Result of two verdicts that agree, for the player that is A in the first and B in the second."""


@dataclass(frozen=True)
class JudgeRun:
    """A judge, the responses of the players, and the notes about their scores."""

    judge: Judge
    questions: Sequence[Question]
    references: References
    response_sets: Mapping[int, ResponseSet]  # by player
    settings: dict[str, Any]  # of the scores
    notes: list[str] = field(default_factory=list)

    def score(self, values: Values, metric: str, counts: dict[str, Any]) -> Score:
        groups = by_question(values)
        return Score(*clustered_mean(groups), metric, len(groups), self.settings, counts)

    def counts(self, verdicts: Sequence[object], judged: int, journal: Journal) -> dict[str, Any]:
        """Return what a score leaves out, and the file with its judgments."""
        return {
            "unparsable": verdicts.count(None),
            "missing_responses": sum(len(question.turns) for question in self.questions) - judged,
            "judgments": journal.path.name,
        }

    def note_unparsable(self, label: str, verdicts: Sequence[object]) -> None:
        if count := verdicts.count(None):
            self.notes.append(f"{label}: {count} of {len(verdicts)} verdicts could not be parsed and are not counted")


@dataclass(frozen=True)
class JudgeRequest:
    turn: Turn
    prompt: str  # name of the judge's prompt
    messages: list[Message]

    @property
    def digest(self) -> str:
        return short_digest(self.messages)


def by_question(values: Values) -> list[list[float]]:
    """Group the values by question, without those that could not be parsed."""
    groups: dict[QuestionId, list[float]] = defaultdict(list)
    for (question_id, _), value in values.items():
        if value is not None:
            groups[question_id].append(value)
    return list(groups.values())


def parse_rating(judgment: str) -> float | None:
    """Return the rating, 1 to 10, written as [[7]] or [[7.5]], or as [7] if there are no double brackets.

    None if there is no rating, if it is out of range, or if there are different ones.
    """
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    text = _without_thoughts(judgment)
    ratings = {float(match) for match in re.findall(rf"\[\[{number}\]\]", text) or re.findall(rf"\[{number}\]", text)}
    return ratings.pop() if len(ratings) == 1 and 1 <= min(ratings) <= 10 else None


def parse_choice(judgment: str) -> str | None:
    """Return A, B or C, written as [[A]]; None if there is no choice, or if there are different ones."""
    choices = set(re.findall(r"\[\[\s*([ABC])\s*\]\]", _without_thoughts(judgment)))
    return choices.pop() if len(choices) == 1 else None


def _without_thoughts(judgment: str) -> str:
    return judgment.rpartition("</think>")[2]


def comparison_result(first: str | None, second: str | None) -> float | None:
    """Return the result for the player that is A in the first verdict and B in the second.

    1 if the player wins both, 0 if it loses both, else 0.5; None if a verdict could not be parsed.
    """
    if first is None or second is None:
        return None
    return CONSISTENT_RESULTS.get((first, second), 0.5)


def grade_single(judge_run: JudgeRun, players: Sequence[int]) -> None:
    """Have the judge rate every response from 1 to 10; keep the mean ratings as scores of the run.

    Raises:
        JudgeError: the judge cannot be reached, refuses, or none of its judgments on a player can be parsed.
        StoppedError: the user asked to stop.
    """
    judge, sets = judge_run.judge, judge_run.response_sets
    ratings: dict[int, Values] = {}
    for player in players:
        requests = [
            _judge_request(judge_run, question, turn, {"answer": sets[player][question].turns})
            for question in judge_run.questions
            for turn in range(1, len(sets[player][question].turns) + 1)
        ]
        journal = _open_journal("single", judge, sets[player])
        verdicts = _collect_verdicts(journal, judge, requests, parse_rating, f"{sets[player].name}: grade")
        ratings[player] = {request.turn: verdict for request, verdict in zip(requests, verdicts, strict=True)}
        scores = _single_scores(judge_run, ratings[player], judge_run.counts(verdicts, len(requests), journal))
        add_scores(sets[player].run.folder, player, SUITE, scores, replace=True)
        judge_run.note_unparsable(sets[player].name, verdicts)
    for player in players[1:]:
        difference = _paired_difference(ratings[player], ratings[players[0]])
        judge_run.notes.append(f"{sets[player].name} − {sets[players[0]].name}: {difference}")


def _single_scores(judge_run: JudgeRun, ratings: Values, counts: dict[str, Any]) -> dict[str, Score]:
    """Return the mean ratings: overall, by turn, and by category. A task without ratings is left out."""
    categories = {question.question_id: question.category for question in judge_run.questions}
    tasks = {"overall": ratings}
    for number in (1, 2):
        tasks[f"turn {number}"] = {turn: value for turn, value in ratings.items() if turn[1] == number}
    for category in dict.fromkeys(categories.values()):
        tasks[category] = {turn: value for turn, value in ratings.items() if categories[turn[0]] == category}
    return {task: judge_run.score(values, "points", counts) for task, values in tasks.items() if by_question(values)}


def _paired_difference(ratings: Values, baseline: Values) -> str:
    """Describe the mean difference between two players, over the responses for which both have a rating."""
    differences: dict[Turn, float | None] = {}
    for turn, rating in ratings.items():
        if rating is not None and (other := baseline.get(turn)) is not None:
            differences[turn] = rating - other
    groups = by_question(differences)
    if len(groups) < 2:
        return "fewer than two questions have a rating for both"
    mean, error = clustered_mean(groups)
    assert error is not None, "there are two questions"
    noise = "" if abs(mean) > 2 * error else "; within the noise"
    return f"{mean:+.2f} ± {error:.2f} points, paired over {len(groups)} questions{noise}"


def grade_pairwise(judge_run: JudgeRun, player: int, baseline: int) -> None:
    """Have the judge compare every response of a player with the baseline's, in both orders; keep the win rate.

    Raises:
        DataError: there is no turn that both players responded to.
        JudgeError: the judge cannot be reached, refuses, or no judgment can be parsed.
        StoppedError: the user asked to stop.
    """
    response_set, baseline_set = judge_run.response_sets[player], judge_run.response_sets[baseline]
    label = f"{response_set.name} against {baseline_set.name}"
    results: dict[Turn, float | None] = {}
    requests: list[JudgeRequest] = []
    for question in judge_run.questions:
        responses, others = response_set[question].turns, baseline_set[question].turns
        for turn in range(1, min(len(responses), len(others)) + 1):
            if responses[:turn] == others[:turn]:  # a tie without asking the judge
                results[question.question_id, turn] = 0.5
            else:
                for a, b in ((responses, others), (others, responses)):
                    requests.append(_judge_request(judge_run, question, turn, {"answer_a": a, "answer_b": b}))
    identical = len(results)
    kind = f"pairwise-{response_set.run.folder.iteration(baseline).name}"
    journal = _open_journal(kind, judge_run.judge, response_set, baseline_set)
    choices = _collect_verdicts(journal, judge_run.judge, requests, parse_choice, f"{label}: compare")
    comparisons = list(zip(choices[::2], choices[1::2], strict=True))
    for request, comparison in zip(requests[::2], comparisons, strict=True):
        results[request.turn] = comparison_result(*comparison)
    if not results:
        raise DataError(f"{label}: there is no question that both players responded to")
    tally = Counter(results.values())
    inconsistent = sum(None not in comparison and comparison not in CONSISTENT_RESULTS for comparison in comparisons)
    counts = {
        **judge_run.counts(choices, len(results), journal),
        **{"wins": tally[1.0], "ties": tally[0.5], "losses": tally[0.0]},
        **{"identical": identical, "inconsistent": inconsistent},
    }
    score = judge_run.score(results, "win rate", counts)
    add_scores(response_set.run.folder, player, PAIRWISE_SUITE, {f"against {baseline_set.name}": score})
    judge_run.notes.append(
        f"{label}: {tally[1.0]} wins, {tally[0.5]} ties ({identical} with identical responses), {tally[0.0]} losses. "
        f"With the players swapped the judge contradicted itself in {inconsistent} of {len(comparisons)} comparisons"
    )
    judge_run.note_unparsable(label, choices)


def _judge_request(
    judge_run: JudgeRun, question: Question, turn: int, responses: Mapping[str, Sequence[str]]
) -> JudgeRequest:
    """Return the request to judge a turn (from 1) together with the turns before it.

    `responses` are those of one player as `answer`, or of two players as `answer_a` and `answer_b`.
    """
    reference = judge_run.references.get(question.question_id, ())
    name = prompt_name(pairwise=len(responses) > 1, turn=turn, reference=bool(reference))
    texts = {"question": question.turns[0], **{kind: turns[0] for kind, turns in responses.items()}}
    for number in range(1, turn + 1):
        texts[f"question_{number}"] = question.turns[number - 1]
        texts |= {f"{kind}_{number}": turns[number - 1] for kind, turns in responses.items()}
    texts |= {f"ref_answer_{number}": text for number, text in enumerate(reference, start=1)}
    return JudgeRequest((question.question_id, turn), name, judge_run.judge.prompts[name].messages(texts))


def _open_journal(kind: str, judge: Judge, *response_sets: ResponseSet) -> Journal:
    """Open the journal of the judgments of these responses, in the first player's folder."""
    fingerprint = [*(response_set.fingerprint for response_set in response_sets), list(judge.fingerprint.values())]
    model = re.sub(r"[^A-Za-z0-9.]+", "-", judge.model).strip("-.")[-60:]
    return Journal(response_sets[0].folder / f"{kind}-{model}-{short_digest(fingerprint)}.jsonl")


def _collect_verdicts(
    journal: Journal,
    judge: Judge,
    requests: Sequence[JudgeRequest],
    parse: Callable[[str], Value | None],
    label: str,
) -> list[Value | None]:
    """Return the verdicts in the order of the requests. New ones are added to the journal as they arrive.

    Raises:
        JudgeError: no judgment could be parsed, or see `Judge.ask`.
    """
    verdicts: dict[str, Value | None] = {row["request"]: row["verdict"] for row in journal.records}
    new = list({request.digest: request for request in requests if request.digest not in verdicts}.values())

    with track(label, len(requests), completed=len(requests) - len(new), unit="characters") as advance:

        def record(index: int, judgment: str) -> None:
            request = new[index]
            question_id, turn = request.turn
            about = {"question_id": question_id, "turn": turn, "judge": [judge.model, request.prompt]}
            verdicts[request.digest] = parse(judgment)
            decision = {"verdict": verdicts[request.digest], "judgment": judgment}
            journal.add({**about, **decision, "request": request.digest})
            advance(1, len(judgment))

        if new:
            judge.ask([request.messages for request in new], record)
    collected = [verdicts[request.digest] for request in requests]
    if collected and not any(verdict is not None for verdict in collected):
        text = " ".join(journal.records[-1]["judgment"].split())
        raise JudgeError(
            f"{judge.model}: no judgment could be parsed, so there is no score. The last one is {shortened(text)!r}; "
            f"all are in {journal.path}. Use a stronger judge, raise max_tokens in judge.yaml, or name another "
            "prompts_file there"
        )
    return collected
