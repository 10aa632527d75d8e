"""What a judge is asked: spinlm's own wording, or that of a file in the format of MT-Bench's judge_prompts.jsonl."""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spinlm.errors import DataError
from spinlm.rundir.records import Message

_FIELDS = {
    "single-v1": {"question", "answer"},
    "single-v1-multi-turn": {"question_1", "answer_1", "question_2", "answer_2"},
    "pair-v2": {"question", "answer_a", "answer_b"},
    "pair-v2-multi-turn": {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2"},
}
_REFERENCES = {"ref_answer_1", "ref_answer_2"}
FIELDS: dict[str, set[str]] = _FIELDS | {
    name.replace("-v1", "-math-v1").replace("-v2", "-math-v1"): fields | _REFERENCES for name, fields in _FIELDS.items()
}
"""The names of the prompts, as MT-Bench has them, and what may stand in their templates; `a`, `b` are two players."""


@dataclass(frozen=True)
class JudgePrompt:
    """A system message (empty: none) and a template of `str.format` for the question to the judge."""

    system: str
    template: str

    def messages(self, texts: Mapping[str, str]) -> list[Message]:
        """The conversation to send."""
        asked = {"role": "user", "content": self.template.format_map(texts)}
        return [{"role": "system", "content": self.system}, asked] if self.system else [asked]


def prompt_name(*, pairwise: bool, turn: int, reference: bool) -> str:
    """The prompt for a turn (from 1), with or without a reference answer."""
    kind = ("pair-math-v1" if reference else "pair-v2") if pairwise else "single-math-v1" if reference else "single-v1"
    return kind if turn == 1 else f"{kind}-multi-turn"


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Prompts from a file in MT-Bench's format; those with names that are not in `FIELDS` are left out.

    Raises:
        DataError: it cannot be read, or a prompt of it not used.
    """
    prompts = {}
    for number, line in enumerate(read_text(path, "--judge-prompts").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            name, system, template = row["name"], row["system_prompt"], row["prompt_template"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{where}: not a judge prompt ({error!r}). A line is a JSON object with name, system_prompt and "
                "prompt_template"
            ) from error
        if name not in FIELDS:
            continue
        if not isinstance(system, str) or not isinstance(template, str):
            raise DataError(f"{where}: system_prompt and prompt_template of {name} must be texts")
        _check_template(template, FIELDS[name], f"{where}: prompt_template of {name}")
        prompts[name] = JudgePrompt(system, template)
    return prompts


def _check_template(template: str, allowed: set[str], where: str) -> None:
    try:
        found = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise DataError(f"{where}: {error}. Write a brace that is meant as text twice") from error
    if found - allowed:
        raise DataError(
            f"{where}: unknown field {{{min(found - allowed)}}}; it may use {', '.join(sorted(allowed))}. Write a "
            "brace that is meant as text twice"
        )
    if missing := {field for field in allowed if field.startswith("answer")} - found:
        raise DataError(f"{where}: does not show {{{min(missing)}}}, which is what is to be judged")


def read_text(path: Path, option: str) -> str:
    """The text of a file that an option names.

    Raises:
        DataError: it is not there, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not a UTF-8 text"
        raise DataError(f"{option}: {path} cannot be read ({reason})") from error


_SINGLE = """\
You are to mark an answer that a language model gave to a user. Ask yourself whether it does what the user wanted, \
whether what it says is true, whether anything important is missing and whether anything in it is in the way.{extra}

{material}

Explain your opinion in two to five sentences. After that, end with a whole mark from 1 (of no use) to 10 (you would \
not change a thing), inside two pairs of square brackets, in this form: [[MARK]]"""

_PAIR = """\
Two language models, A and B, were given the same task by a user. Decide whose work the user is better served by. Look \
at whether each does what was wanted and whether what it says is true. Which of them is shown first means nothing, and \
a longer text is not a better one.{extra}

{material}

Explain your opinion in two to five sentences. After that, end with your decision inside two pairs of square brackets: \
[[A]] when A is better, [[B]] when B is better, [[C]] when neither is."""

_CHECKED = " A solution that is known to be right is given: hold every result against it, and say where it differs."
_SECOND = " The user wrote twice. Only what came in reply to the second message counts; the first is there to \
understand it."


def _part(title: str, field: str) -> str:
    return f"<{title}>\n{{{field}}}\n</{title}>"


def _talk(who: str, kind: str) -> list[str]:
    """Two answers of one player (`answer`, `answer_a`, `answer_b`) or the references, between the user's messages."""
    return [_part(f"{who} {turn}", f"{kind}_{turn}") for turn in (1, 2)]


def _own_prompts() -> dict[str, JudgePrompt]:
    prompts = {}
    for pairwise in (False, True):
        wording = _PAIR if pairwise else _SINGLE
        players = {"answer of A": "answer_a", "answer of B": "answer_b"} if pairwise else {"answer": "answer"}
        for reference in (False, True):
            checked = _CHECKED if reference else ""
            one = [_part("task", "question")]
            two = [_part(f"message {turn}", f"question_{turn}") for turn in (1, 2)]
            if reference:
                one.append(_part("known solution", "ref_answer_1"))
                two += _talk("known solution", "ref_answer")
            for title, field in players.items():
                one.append(_part(title, field))
                two += _talk(title, field)
            for turn, extra, parts in ((1, checked, one), (2, _SECOND + checked, two)):
                name = prompt_name(pairwise=pairwise, turn=turn, reference=reference)
                prompts[name] = JudgePrompt("", wording.format(extra=extra, material="\n\n".join(parts)))
    return prompts


OWN_PROMPTS = _own_prompts()
