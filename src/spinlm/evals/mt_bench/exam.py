"""An exam: players of a run answer questions of two turns, through the same renderer and engine as in the run."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinlm.distributed.progress import track
from spinlm.errors import DataError, RunError
from spinlm.evals.mt_bench.questions import OTHER_TEMPERATURE, TEMPERATURES, Question, References
from spinlm.recipe.schema import Recipe
from spinlm.rundir.journal import Journal
from spinlm.rundir.layout import RunDir
from spinlm.rundir.records import Message, Sampling
from spinlm.rundir.stage_graph import START, player_name
from spinlm.utils.atomic import short_digest
from spinlm.utils.seeds import derive_seed

if TYPE_CHECKING:
    from spinlm.data.renderer import Renderer

BATCH = 32  # questions answered at once; they are on disk together


@dataclass(frozen=True)
class Answered:
    """What a player answered to a question."""

    turns: tuple[str, ...]  # fewer than the question has where it could not go on
    finished: tuple[bool, ...]  # whether each ended by itself, not at the limit
    problem: str | None  # why it could not go on


Answers = dict[int | str, Answered]
"""A player's answers by the id of the question."""


@dataclass(frozen=True)
class Exam:
    """The questions, and players to answer them."""

    recipe: Recipe
    run: RunDir
    everything: list[Question]
    questions: list[Question]  # the first of them
    references: References
    max_new_tokens: int

    def folder(self, player: int) -> Path:
        return self.run.iteration(player) / "mt-bench"

    def fingerprint(self, player: int) -> dict[str, Any]:
        """All that a player's answers depend on."""
        return {
            "player": self.run.player_digest(player),
            "questions": [question.plain() for question in self.everything],
            "temperatures": [TEMPERATURES, OTHER_TEMPERATURE],
            "max_new_tokens": self.max_new_tokens,
            "batch": BATCH,
            "seed": self.recipe.seed,
        }

    def unanswered(self, player: int) -> bool:
        """Whether there is a question that a player has not answered."""
        done = self._read(self._journal(player))
        return any(question.id not in done for question in self.questions)

    def answers(self, player: int) -> Answers:
        """A player's answers: those on disk, and those it gives now."""
        journal = self._journal(player)
        done = self._read(journal)
        if self.unanswered(player):
            with track(f"{player_name(player)}: answer", len(self.questions) * 2) as advance:
                for batch, questions in self._batches():
                    if any(question.id not in done for question in questions):
                        given = self._answer(player, batch, questions, advance)
                        new = [(q, answer) for q, answer in zip(questions, given, strict=True) if q.id not in done]
                        journal.add(*(self._record(player, question, answer) for question, answer in new))
                        done |= {question.id: answer for question, answer in new}
                    else:
                        advance(len(questions) * 2)
        answers = {question.id: done[question.id] for question in self.questions}
        if not any(answer.turns for answer in answers.values()):
            raise DataError(
                f"{player_name(player)} can answer none of these questions. Of question {self.questions[0].id}: "
                f"{answers[self.questions[0].id].problem}"
            )
        return answers

    def remarks(self, player: int, answers: Answers) -> list[str]:
        """What is to be known about a player's answers."""
        stuck = [(name, answer.problem) for name, answer in answers.items() if answer.problem]
        cut = sum(not finished for answer in answers.values() for finished in answer.finished)
        lines = []
        if stuck:
            lines.append(
                f"{player_name(player)}: {len(stuck)} of {len(answers)} questions could not be answered to the end; "
                f"question {stuck[0][0]}: {stuck[0][1]}"
            )
        if cut:
            given = sum(len(answer.turns) for answer in answers.values())
            lines.append(
                f"{player_name(player)}: {cut} of {given} answers were cut at the length limit, and judged as they are"
            )
        return lines

    def _journal(self, player: int) -> Journal:
        return Journal(self.folder(player) / f"answers-{short_digest(self.fingerprint(player))}.jsonl")

    def _batches(self) -> Iterator[tuple[int, list[Question]]]:
        """Questions of one temperature, `BATCH` at most. A question's place does not depend on how many are taken."""
        groups: dict[float, list[Question]] = defaultdict(list)
        for question in self.questions:
            groups[question.temperature].append(question)
        for group in groups.values():
            for batch, first in enumerate(range(0, len(group), BATCH)):
                yield batch, group[first : first + BATCH]

    def _answer(
        self, player: int, batch: int, questions: Sequence[Question], advance: Callable[..., None]
    ) -> list[Answered]:
        """Answers to all turns of some questions of one temperature."""
        from spinlm.errors import RowError
        from spinlm.generation import local_engine
        from spinlm.model.players import seat

        players = seat(self.recipe, self.run)
        players.become(player)
        opponent = local_engine(self.recipe, players, self.run.metadata("sft", START)["prefix_sharing"])
        positions = getattr(players.model.config, "max_position_embeddings", None) or self.recipe.train.max_length
        sampling = Sampling(
            temperature=questions[0].temperature,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            max_length=positions,
            samples=1,
            stop_ids=players.renderer.stop_ids,
        )
        given = [Answered((), (), None) for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            prompts: dict[int, list[int]] = {}
            for place, question in enumerate(questions):
                if turn < len(question.turns) and given[place].problem is None:
                    try:
                        prompts[place] = _prompt(players.renderer, question, given[place].turns, positions)
                    except RowError as error:
                        given[place] = replace(given[place], problem=f"turn {turn + 1}: {error}")
            # The same draws for every player: what differs between their answers is the players.
            seed = derive_seed(self.recipe.seed, "exam", turn, str(sampling.temperature), batch)
            replies = opponent.generate(list(prompts.values()), sampling, seed, advance)
            for place, (reply,) in zip(prompts, replies, strict=True):
                text = players.renderer.decode(reply.token_ids)
                before = given[place]
                given[place] = Answered((*before.turns, text), (*before.finished, reply.finished), None)
        return given

    def _record(self, player: int, question: Question, answer: Answered) -> dict[str, Any]:
        """An answer as FastChat writes it, and what else is to be kept."""
        return {
            "question_id": question.id,
            "model_id": f"{self.run.root.resolve().name}/{self.run.iteration(player).name}",
            "category": question.category,
            "temperature": question.temperature,
            "choices": [{"index": 0, "turns": list(answer.turns)}],
            "finished": list(answer.finished),
            "problem": answer.problem,
        }

    @staticmethod
    def _read(journal: Journal) -> Answers:
        try:
            return {
                row["question_id"]: Answered(tuple(row["choices"][0]["turns"]), tuple(row["finished"]), row["problem"])
                for row in journal.records
            }
        except (KeyError, IndexError, TypeError) as error:
            raise RunError(
                f"{journal.path}: not answers ({error!r}). Delete it, and run again to make it anew"
            ) from error


def _prompt(renderer: "Renderer", question: Question, answers: Sequence[str], positions: int) -> list[int]:
    """The tokens that the turn after these answers is answered from.

    Raises:
        RowError: it cannot be rendered, or leaves no room in so many positions.
    """
    from spinlm.errors import RowError

    messages: list[Message] = []
    for said, answer in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    ids = renderer.prompt_ids([*messages, {"role": "user", "content": question.turns[len(answers)]}])
    if len(ids) >= positions:
        raise RowError(
            "prompt_too_long",
            f"it has {len(ids)} tokens with what comes before it, and the model has {positions} positions",
        )
    return ids
